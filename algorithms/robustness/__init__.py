"""Models that withstand attacks on their inputs."""
