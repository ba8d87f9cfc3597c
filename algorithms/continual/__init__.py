"""Methods that learn one task after another and are to forget none."""
