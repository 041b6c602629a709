"""``refsam evaluate``: score masks, or run a model on a benchmark and score it."""

import typer

from refsam.cli.evaluate.benchmarks import (
    folder,
    long_rvos,
    mevis,
    ref_davis17,
    ref_youtube_vos,
    refcoco,
)
from refsam.cli.evaluate.generated import generated
from refsam.cli.evaluate.masks import masks

app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")


@app.callback()
def evaluate() -> None:
    """Score masks, or a model on a benchmark."""


for _command in (masks, generated, ref_davis17, ref_youtube_vos, mevis, refcoco, long_rvos, folder):
    app.command()(_command)
