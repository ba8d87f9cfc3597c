"""Models that withstand attacks on their inputs, training that withstands malicious clients."""
