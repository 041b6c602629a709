"""``refsam data``: what is there of a dataset, and Ref-DAVIS17 made from its originals."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Datasets: check them, prepare Ref-DAVIS17.")


@app.command()
def check(
    root: Annotated[
        Path, typer.Argument(help="Folder of the dataset, as docs/data.md lays it out.")
    ],
    dataset: Annotated[
        str | None,
        typer.Option(help="Which dataset it should be; recognised by its files unless given."),
    ] = None,
    decode: Annotated[
        bool, typer.Option("--decode", help="Decode every image and mask, too; this takes a while.")
    ] = False,
) -> None:
    """Print what is there, missing and broken, and where each file is to be had.

    The exit code is 2 if something is broken, or if no split is there.
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
        typer.echo("\nwhere it is to be had")
    for source, parts in sources.items():
        typer.echo(f"  {', '.join(parts)}: {source}")
    if any(row.state == "broken" for row in findings) or all(row.state != "ok" for row in findings):
        raise typer.Exit(2)


@app.command("prepare-davis17")
def prepare_davis17(
    davis: Annotated[
        Path, typer.Argument(help="DAVIS 2017: JPEGImages, Annotations_unsupervised, ImageSets.")
    ],
    texts: Annotated[Path, typer.Argument(help="The unpacked davis_text_annotations.zip.")],
    out: Annotated[Path, typer.Option("--out", help="The new folder to write.")],
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy frames and masks instead of linking to them.")
    ] = False,
) -> None:
    """Make Ref-DAVIS17 out of DAVIS 2017 and the four text files; DAVIS stays as it is."""
    from refsam.data.ref_davis17 import prepare

    counts = prepare(davis, texts, out, copy=copy)
    written = ", ".join(f"{count} expressions in {split}" for split, count in counts.items())
    typer.echo(f"{written}\nwritten: {out}")
