"""``python -m refsam`` is the command ``refsam``."""

from refsam.cli import main

main(prog_name="refsam")
