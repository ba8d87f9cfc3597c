"""Clients whose models differ in architecture, and meet in what has one shape for all."""
