"""``refsam export``: a checkpoint as ONNX and `torch.export` files."""

from pathlib import Path
from typing import Annotated

import typer

from refsam.cli.options import CheckpointOption
from refsam.errors import UserError

app = typer.Typer(rich_markup_mode="markdown")


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="Folder for the files; it must not exist yet.")],
    checkpoint: CheckpointOption = "nano",
    sam: Annotated[Path | None, typer.Option(help="SAM's file, for a checkpoint that is a delta.")] = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="onnx or torch; repeat it for both, which is the default.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Side of the model's square in pixels, if not the checkpoint's.")
    ] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Run every file and compare the results.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export in the folder.")] = False,
) -> None:  # fmt: skip
    """Export the image encoder and the mask decoder as ONNX and torch.export graphs.

    Writes into the folder OUT:

    - `image_encoder.onnx` and `.pt2`: `pixels` to `levels`, at the model's own size
    - `mask_decoder.onnx` and `.pt2`: `levels`, `tokens`, `lengths`, `track`, `has_track` to `logits`,
      `iou`, `next_track`, for any number of expressions and words
    - `export.json`: names, shapes, how to normalise pixels, and the errors of the results

    Example: `refsam export --checkpoint nano --format onnx --out exported`
    """
    from refsam.export import FORMATS, check_export

    formats = list(dict.fromkeys(formats or FORMATS))
    if unknown := set(formats) - set(FORMATS):
        raise UserError(f"--format {unknown.pop()}: want {' or '.join(FORMATS)}")
    check_export(out, formats, check=check, overwrite=overwrite)
    from refsam.export import export_model
    from refsam.model import load_model

    model = load_model(checkpoint, sam=sam, image_size=image_size)
    facts = export_model(model, out, formats=formats, check=check, overwrite=overwrite)
    for name, size in facts["files"].items():
        typer.echo(f"{name:24} {size / 1e6:10.1f} MB")
    for name, graph in facts["graphs"].items():
        off = {key: graph[key]["largest_difference"] for key in formats if key in graph}
        if off:
            listed = ", ".join(f"{key} {value:.0e}" for key, value in off.items())
            typer.echo(f"{name}: off by at most, of the largest value: {listed}")
    typer.echo(f"written: {out}")
