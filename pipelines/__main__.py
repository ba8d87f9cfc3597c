"""`python -m pipelines` is the command `fedjax-core`."""

from pipelines.cli.commands import main

main(prog_name="fedjax-core")
