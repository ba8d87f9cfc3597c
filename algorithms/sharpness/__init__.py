"""Local steps toward flat minima."""
