"""``refsam data``: check a dataset; make Ref-DAVIS17 from its originals."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Check, divide and prepare datasets.",
)


@app.command()
def check(
    root: Annotated[Path, typer.Argument(help="Folder of the dataset, laid out as docs/data.md says.")],
    dataset: Annotated[
        str | None, typer.Option(help="Name of the dataset; by default it is recognised by its files.")
    ] = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="Decode every image and mask, too; this takes a while.")
    ] = False,
) -> None:  # fmt: skip
    """Print what is present, missing and broken, and where to get each file.

    The exit code is 2 if something is broken, or if there is no split.
    """
    from refsam.cli.progress import progress
    from refsam.data.check import check, recognise

    names = (dataset,) if dataset else recognise(root)
    with progress("checking", None, "videos") as advance:
        findings = [
            row for name in names for row in check(name, root, decode=decode, advance=advance)
        ]
    rows = [("dataset", "split", "part", "state", "found")]
    rows += [(row.dataset, row.split, row.part, row.state, row.detail) for row in findings]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for *cells, detail in rows:
        aligned = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
        typer.echo("  ".join([*aligned, detail]))
    sources: dict[str, list[str]] = {}
    for row in findings:
        if row.state != "ok":
            sources.setdefault(row.source, []).append(f"{row.dataset} {row.split} {row.part}")
    if sources:
        typer.echo("\nwhere to get it")
    for source, parts in sources.items():
        typer.echo(f"  {', '.join(parts)}: {source}")
    if any(row.state == "broken" for row in findings) or all(row.state != "ok" for row in findings):
        raise typer.Exit(2)


@app.command("prepare-davis17")
def prepare_davis17(
    davis: Annotated[Path, typer.Argument(help="DAVIS 2017: JPEGImages, Annotations_unsupervised, ImageSets.")],
    texts: Annotated[Path, typer.Argument(help="The unpacked davis_text_annotations.zip.")],
    out: Annotated[Path, typer.Option("--out", help="The new folder to write.")],
    copy: Annotated[bool, typer.Option("--copy", help="Copy frames and masks instead of linking to them.")] = False,
) -> None:  # fmt: skip
    """Make Ref-DAVIS17 from DAVIS 2017 and the four text files. DAVIS itself is not changed."""
    from refsam.data.ref_davis17 import prepare

    counts = prepare(davis, texts, out, copy=copy)
    written = ", ".join(f"{count} expressions in {split}" for split, count in counts.items())
    typer.echo(f"{written}\nwritten: {out}")


@app.command()
def split(
    root: Annotated[Path, typer.Argument(help="Your own videos, laid out as docs/data.md says.")],
    out: Annotated[Path, typer.Option("--out", help="The new folder to write.")],
    validation: Annotated[float, typer.Option(help="Share of the videos to validate on, between 0 and 1.")] = 0.2,
    source: Annotated[str, typer.Option("--split", help="The split of ROOT to divide.")] = "train",
    seed: Annotated[int, typer.Option(help="Another seed draws other videos.", min=0)] = 0,
    copy: Annotated[bool, typer.Option("--copy", help="Copy frames and masks instead of linking to them.")] = False,
) -> None:  # fmt: skip
    """Divide your own videos, each as a whole, into train and validation; the originals stay where they are."""
    from refsam.data.splitting import split_folder

    parts = split_folder(root, out, split=source, share=validation, seed=seed, copy=copy)
    for name, videos in parts.items():
        typer.echo(
            f"{name}: {len(videos)} videos ({', '.join(videos[:8])}{', ...' if videos[8:] else ''})"
        )
    typer.echo(f"written: {out}")


@app.command("encode-text")
def encode_text(
    config: Annotated[Path, typer.Argument(help="YAML file of a training run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Entries to change.")
    ] = None,
) -> None:
    """Encode all expressions of a run once, into its text_cache, so that no training process loads the text encoder."""
    from refsam.cli.progress import progress
    from refsam.training.settings import TrainingSettings
    from refsam.training.start import encode_text as run

    settings = TrainingSettings.from_yaml(config, overrides or ())
    with progress("encoding", None, "expressions") as advance:
        new = run(settings, advance)
    typer.echo(f"{new} expressions encoded, those before kept: {settings.text_cache}")


@app.command()
def show(
    config: Annotated[Path, typer.Argument(help="YAML file of a training run.")],
    out: Annotated[Path, typer.Option("--out", help="The HTML file to write.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Entries to change.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Number of steps whose clips are shown.", min=1)] = 8,
) -> None:
    """Show what a run trains on, after augmentation: clips with their masks and expressions, as one page."""
    from refsam.training.samples import write_page
    from refsam.training.settings import TrainingSettings

    settings = TrainingSettings.from_yaml(config, overrides or ())
    count = write_page(settings, out, min(steps, sum(stage.steps for stage in settings.stages)))
    typer.echo(f"{count} clips: {out}")
