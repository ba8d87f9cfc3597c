"""`python -m pipelines` is the command `fedjax-core`."""

from pipelines.cli import main

main(prog_name="fedjax-core")
