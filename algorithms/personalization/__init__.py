"""Models that clients keep for themselves, in part or whole, and models that adapt to a client's examples."""
