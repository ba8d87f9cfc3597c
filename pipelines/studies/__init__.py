"""Runs of another shape: one task after another, and function values alone."""
