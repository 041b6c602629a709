"""``refsam evaluate generated``: score a model on the frozen benchmark of generated clips."""

from pathlib import Path
from typing import Annotated

import typer

from refsam import __version__
from refsam.cli.options import ModelChoice, grouped
from refsam.cli.progress import progress


@grouped
def generated(
    model: ModelChoice,
    clips: Annotated[int, typer.Option(help="Number of clips, from the first of the 240.", min=1, max=240)] = 240,
    json: Annotated[Path | None, typer.Option(help="Write everything, including each expression.")] = None,
) -> None:  # fmt: skip
    """Run a model on the frozen benchmark of generated clips and score it, by kind of expression."""
    from refsam.evaluation.runners.generated import evaluate_generated, table
    from refsam.evaluation.scoring.results import as_json, check_writable
    from refsam.runtime.files import replace_file

    if json is not None:
        check_writable(json)
    loaded = model.load()
    with progress("scoring", clips, "clips") as advance:
        result = evaluate_generated(loaded, clips, advance)
    typer.echo(table(result["summary"]))
    if json is not None:
        run = {"refsam": __version__, "checkpoint": model.checkpoint, "clips": clips}
        replace_file(json, as_json({**run, **result}))
