"""Local steps that are kept from drifting apart on unlike clients."""
