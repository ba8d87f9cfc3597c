"""Training guided by an exploration of the clients' losses beforehand."""
