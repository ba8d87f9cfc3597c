"""`python -m pipelines` is the command `fedjax-core`."""

import sys

# The current directory comes last, so that a user's models.py there is not taken for this library's `models`.
sys.path.append(sys.path.pop(0))

from pipelines.cli.commands import main

main(prog_name="fedjax-core")
