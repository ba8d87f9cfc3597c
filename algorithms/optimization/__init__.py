"""Federated optimization: one file per method. Import the factories from `algorithms`."""
