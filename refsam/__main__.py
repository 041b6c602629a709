"""``python -m refsam`` is the command ``refsam``."""

from refsam.cli import start

start()
