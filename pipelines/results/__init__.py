"""What is measured and told of a run: histories, early stopping, the report, logs."""
