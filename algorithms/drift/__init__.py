"""Local steps that are kept from drifting apart on heterogeneous clients."""
