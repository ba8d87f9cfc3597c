"""What the server makes of what clients have moved: averages, normalized or extrapolated, and server optimizers."""
