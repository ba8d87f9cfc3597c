"""A laboratory of convergence: problems whose constants are known, curves of every round, and rates fitted to them."""
