"""`python -m tests.training.waiting STEP ARGUMENTS...`: `refsam ARGUMENTS...`, which waits for the end of its input at a step.

So a test ends a run where it means to, however fast the run and however slow the test.
"""

import sys
from typing import Any

import typer

from refsam.cli import main

_echo = typer.echo


def _echo_and_wait(text: str, **options: Any) -> None:
    _echo(text, **options)
    if text.startswith(f"step {sys.argv[1]}/"):
        sys.stdin.read()


if __name__ == "__main__":
    typer.echo = _echo_and_wait
    main(sys.argv[2:])
