"""``refsam info``: what is installed, what the machine has and which kernels would run."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import typer

from refsam.cli.options import choose_device, choose_dtype

app = typer.Typer(rich_markup_mode="markdown")
_PACKAGES = "numpy av pillow safetensors tokenizers transformers triton".split()


@app.command()
def info() -> None:
    """Print versions, hardware, and for each operator the backend that would run here and why.

    Put this into a bug report.
    """
    import torch
    from refsam_kernels.info import describe

    from refsam import __version__

    typer.echo(f"refsam {__version__}, Python {platform.python_version()}, {platform.platform()}")
    typer.echo(
        f"torch {torch.__version__}, {os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"
    )
    typer.echo(", ".join(f"{name} {_version(name)}" for name in _PACKAGES))
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        memory = f"{facts.total_memory / 2**30:.0f} GiB"
        typer.echo(f"cuda:{index}: {facts.name}, capability {facts.major}.{facts.minor}, {memory}")
    if not torch.cuda.is_available():
        typer.echo("no CUDA GPU")
    place = choose_device("auto")
    precision = str(choose_dtype("auto", place)).removeprefix("torch.")
    typer.echo(f"--device auto is {place}, --dtype auto is {precision}")
    typer.echo(describe())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
