"""``refsam evaluate``: score masks against the truth; the runs on benchmarks are in `evaluate_runs`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from refsam import __version__
from refsam.allocation import keep_freed_memory
from refsam.cli.evaluate_runs import mevis, ref_davis17, ref_youtube_vos, refcoco
from refsam.cli.progress import progress
from refsam.cores import available_cores
from refsam.errors import UserError

app = typer.Typer(no_args_is_help=True)


@app.callback()
def evaluate() -> None:
    """Score masks, or a model on a benchmark."""


@app.command()
def masks(
    pred: Annotated[
        Path,
        typer.Option(
            help="Folder of predicted PNGs: <video>/<frame>.png, per expression <video>/<expression>/<frame>.png."
        ),
    ],
    gt: Annotated[
        Path,
        typer.Option(
            help="Folder of true PNGs, laid out likewise; with --expressions, maps of objects <video>/<frame>.png, "
            "or the file mask_dict.json of MeViS."
        ),
    ],
    protocol: Annotated[
        str, typer.Option(help="davis-unsupervised, davis-semi-supervised or per-expression.")
    ] = "davis-unsupervised",
    expressions: Annotated[
        Path | None,
        typer.Option(help="meta_expressions.json that says which objects each expression means."),
    ] = None,
    videos: Annotated[
        Path | None,
        typer.Option(help="Text file of the videos to score, one a line, such as DAVIS' val.txt."),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Write everything, scores of each frame included.")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Write one row per object.")] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Folder for curves of J and F over time, one PNG per video.")
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(help="Folder for report.html (one file, no network) and report.md."),
    ] = None,
    frames: Annotated[
        Path | None,
        typer.Option(
            help="Folder of pictures <video>/<frame>.jpg or .png for the report to draw on."
        ),
    ] = None,
    missing: Annotated[
        str,
        typer.Option(
            help="error: stop with a list of all that is wrong; zero: score what cannot be used as empty, and list it."
        ),
    ] = "error",
    processes: Annotated[
        int, typer.Option(help="Processes that share the videos; 0 is one per core.")
    ] = 0,
) -> None:
    """Score any model's masks: J, F and J&F with mean, recall and decay, per object and overall."""
    from refsam.evaluation.clips import find_clips, read_names
    from refsam.evaluation.mask_report import (
        Scored,
        folder_frames,
        mask_sections,
        provenance_section,
    )
    from refsam.evaluation.masks import score_layout
    from refsam.evaluation.plots import check_plots, write_plots
    from refsam.evaluation.protocols import find_protocol
    from refsam.evaluation.provenance import provenance
    from refsam.evaluation.reports import write_report
    from refsam.evaluation.results import as_json, check_writable, write_whole

    keep_freed_memory()
    rules = find_protocol(protocol)
    for path in filter(None, (json, csv)):
        check_writable(path)
    if plots is not None:
        check_plots()
    if report is not None:
        check_writable(report / "report.html", make_folder=True)
    if frames is not None and report is None:
        raise UserError("frames: got it without --report, want both")
    pictures = None if frames is None else folder_frames(frames)
    names = None if videos is None else read_names(videos)
    layout = find_clips(pred, gt, rules, videos=names, expressions=expressions)
    cores = processes or available_cores()
    with listing_problems(), progress("scoring", len(layout.clips), "clips") as advance:
        result = score_layout(layout, rules, missing=missing, processes=cores, advance=advance)
    typer.echo(result.table())
    if json is not None:
        run = {"refsam": __version__, "prediction": str(pred), "truth": str(gt)}
        write_whole(json, as_json({**run, **result.as_dict()}))
    if csv is not None:
        write_whole(csv, result.as_csv())
    if plots is not None:
        write_plots(result.scores, plots)
    if report is not None:
        sections = mask_sections([Scored("", result, layout.clips)], pictures)
        facts = provenance_section(provenance())
        page, _ = write_report(report, f"Masks scored by {rules.name}", [*sections, facts])
        typer.echo(f"report: {page}")


@app.command()
def generated(
    checkpoint: Annotated[
        str, typer.Option(help="Bundled name, folder or Hub id of the model.")
    ] = "nano",
    clips: Annotated[
        int, typer.Option(help="Only the first so many of the 240 clips.", min=1, max=240)
    ] = 240,
    json: Annotated[
        Path | None, typer.Option(help="Write everything, each sentence included.")
    ] = None,
) -> None:
    """Run a model on the frozen benchmark of generated clips and score it, by kind of sentence."""
    from refsam.evaluation.generated import evaluate_generated, table
    from refsam.evaluation.results import as_json, check_writable, write_whole
    from refsam.model import RefSAM

    if json is not None:
        check_writable(json)
    model = RefSAM.from_pretrained(checkpoint).eval()
    with progress("scoring", clips, "clips") as advance:
        result = evaluate_generated(model, clips, advance)
    typer.echo(table(result["summary"]))
    if json is not None:
        run = {"refsam": __version__, "checkpoint": checkpoint, "clips": clips}
        write_whole(json, as_json({**run, **result}))


for _command in (ref_davis17, ref_youtube_vos, mevis, refcoco):
    app.command()(_command)


@contextmanager
def listing_problems() -> Iterator[None]:
    """Print all that is wrong line by line, then raise one line that counts it."""
    from refsam.evaluation.problems import MaskProblemsError, describe

    try:
        yield
    except MaskProblemsError as error:
        for line in describe(error.problems):
            typer.echo(line, err=True)
        raise UserError(f"{len(error.problems)} problems, listed above: {error.advice}") from error
