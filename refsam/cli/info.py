"""``refsam info``: versions, hardware, and the kernels that would run."""

import os
import platform

import typer

from refsam.runtime.device import choose_device, choose_dtype
from refsam.runtime.provenance import installed

app = typer.Typer(rich_markup_mode="markdown")
_PACKAGES = "numpy av pillow safetensors tokenizers transformers".split()


@app.command()
def info() -> None:
    """Print versions, hardware, and for each operator the backend that would run here and why.

    Put this into a bug report.
    """
    from refsam import __version__

    place = choose_device("auto")
    from refsam.model.packing import has_bfloat16
    from refsam_kernels.info import describe

    precision = str(choose_dtype("auto", place)).removeprefix("torch.")
    if place.type == "cpu" and has_bfloat16():
        precision += ", bfloat16 in the image encoder"
    typer.echo(f"refsam {__version__}, {os.cpu_count()} CPU cores, {platform.platform()}")
    typer.echo(", ".join(f"{name} {installed(name) or 'not installed'}" for name in _PACKAGES))
    typer.echo(f"--device auto is {place}, --dtype auto is {precision}")
    typer.echo(describe())
