"""``refsam evaluate masks``: score masks against the truth."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from refsam import __version__
from refsam.cli.evaluate.problems import listing_problems
from refsam.cli.progress import progress
from refsam.errors import UserError
from refsam.runtime.malloc import keep_freed_memory
from refsam.runtime.threads import available_cores

if TYPE_CHECKING:
    from refsam.evaluation.scoring.clips import Layout


def masks(
    pred: Annotated[
        Path,
        typer.Option(help="Folder of predicted PNGs: `<video>/<frame>.png`, per expression `<video>/<expression>/<frame>.png`."),
    ],
    gt: Annotated[
        Path,
        typer.Option(
            help="Folder of true PNGs in the same layout; with --expressions, maps of objects `<video>/<frame>.png`, the file "
            "mask_dict.json of MeViS, or a split of your own videos (with expressions.csv), for which --pred may be what refsam "
            "segment-videos wrote."
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
        typer.Option(help="Text file of the videos to score, one per line, such as DAVIS' val.txt."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write everything, including the scores of each frame.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write one row per object.")] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Folder for curves of J and F over time, one PNG per video.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Folder for report.html (one file, no network) and report.md.")
    ] = None,
    frames: Annotated[
        Path | None,
        typer.Option(help="Folder of pictures `<video>/<frame>.jpg` or .png for the report to draw on."),
    ] = None,
    missing: Annotated[
        str,
        typer.Option(help="error: stop and list every problem; zero: score unusable masks as empty and list them."),
    ] = "error",
    processes: Annotated[int, typer.Option(help="Processes that share the videos; 0 means one per core.")] = 0,
) -> None:  # fmt: skip
    """Score any model's masks: J, F and J&F with mean, recall and decay, per object and overall."""
    from refsam.evaluation.reports.masks import (
        Scored,
        folder_frames,
        mask_sections,
        provenance_section,
    )
    from refsam.evaluation.reports.plots import check_plots, write_plots
    from refsam.evaluation.reports.report import write_report
    from refsam.evaluation.scoring.clips import find_clips, read_names
    from refsam.evaluation.scoring.masks import score_layout
    from refsam.evaluation.scoring.protocols import find_protocol
    from refsam.evaluation.scoring.results import as_json, check_writable
    from refsam.runtime.files import replace_file
    from refsam.runtime.provenance import provenance

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
    if (gt / "expressions.csv").is_file():
        rules = find_protocol("per-expression")
        layout = _own_layout(pred, gt, expressions, names)
    else:
        layout = find_clips(pred, gt, rules, videos=names, expressions=expressions)
    cores = processes or available_cores()
    with listing_problems(), progress("scoring", len(layout.clips), "clips") as advance:
        result = score_layout(layout, rules, missing=missing, processes=cores, advance=advance)
    typer.echo(result.table())
    if json is not None:
        run = {"refsam": __version__, "prediction": str(pred), "truth": str(gt)}
        replace_file(json, as_json({**run, **result.as_dict()}))
    if csv is not None:
        replace_file(csv, result.as_csv())
    if plots is not None:
        write_plots(result.scores, plots)
    if report is not None:
        sections = mask_sections([Scored("", result, layout.clips)], pictures)
        facts = provenance_section(provenance())
        page, _ = write_report(report, f"Masks scored by {rules.name}", [*sections, facts])
        typer.echo(f"report: {page}")


def _own_layout(
    pred: Path, gt: Path, expressions: Path | None, videos: list[str] | None
) -> "Layout":
    """The clips of your own videos, scored per expression; raises UserError for options that do not apply to them."""
    from refsam.data import open_dataset
    from refsam.evaluation.scoring.own_videos import find_own_clips

    if expressions is not None or videos is not None:
        raise UserError(f"expressions, videos: {gt / 'expressions.csv'} lists them, want neither")
    return find_own_clips(pred, open_dataset("folder", gt.resolve().parent, gt.resolve().name))
