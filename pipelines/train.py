"""Training a configuration and what it has come to, for scripts: `from pipelines.train import train, final_params`."""

from pipelines.run.train import final_params, train

__all__ = ["final_params", "train"]
