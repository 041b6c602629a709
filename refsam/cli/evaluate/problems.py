"""Every problem of a set of masks, one line each."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from refsam.errors import UserError


@contextmanager
def listing_problems() -> Iterator[None]:
    """Print all that is wrong line by line, then raise one line that counts it."""
    from refsam.evaluation.scoring.problems import MaskProblemsError, describe

    try:
        yield
    except MaskProblemsError as error:
        for line in describe(error.problems):
            typer.echo(line, err=True)
        raise UserError(f"{len(error.problems)} problems, listed above: {error.advice}") from error
