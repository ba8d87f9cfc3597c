"""Rounds compiled for slices of TPUs that are not there, and what their programs say of memory and time."""
