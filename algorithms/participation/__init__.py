"""Clients that take part irregularly, late, or with what they sent last time."""
