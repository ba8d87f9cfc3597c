"""The command line `fedjax-core`."""
