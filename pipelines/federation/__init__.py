"""Who holds which examples, what clients do to them, and what that looks like."""
