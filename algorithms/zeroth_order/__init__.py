"""Federated optimization from function values alone. Import the factories from `algorithms`."""
