"""The same federated workloads through this library and through its peers; `python -m benchmarks.peers --help`."""
