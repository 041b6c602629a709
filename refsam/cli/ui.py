"""``refsam ui``: a page in the browser."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from refsam.cli.options import DeviceOption, DtypeOption, ModelChoice, grouped
from refsam.runtime.device import check_names, choose_device

if TYPE_CHECKING:
    from refsam.ui.jobs import Engine

app = typer.Typer(rich_markup_mode="markdown")
_LOCAL = ("127.0.0.1", "localhost", "::1")


@app.command()
@grouped
def ui(
    model: ModelChoice,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port; by default the first free one from 7860 on.")] = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Folder for uploads and results; they go into a temporary folder in it, which is removed at the end.",
            file_okay=False,
            exists=True,
        ),
    ] = None,
    max_megabytes: Annotated[int, typer.Option(min=1, help="Largest upload, in megabytes.")] = 200,
    max_frames: Annotated[int, typer.Option(min=1, help="Longest clip, in frames.")] = 1800,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
) -> None:  # fmt: skip
    """Segment clips in the browser: upload, webcam or a sample; masks and overlay to download.

    Needs `pip install 'refsam[ui]'`. It listens on this machine only, unless `--host` is given; there is no
    password, so anyone who can reach the address can use it. Ctrl-C ends it and removes all uploads and results.
    """
    check_names(device, dtype)
    from refsam.ui import Limits, serve

    if host not in _LOCAL:
        typer.echo(f"refsam: note: whoever can reach {host} may use the page", err=True)
    serve(
        lambda: _load(model, device, dtype),
        host=host,
        port=port,
        folder=folder,
        limits=Limits(megabytes=max_megabytes, frames=max_frames),
        announce=typer.echo,
    )


def _load(choice: ModelChoice, device: str, dtype: str) -> "Engine":
    from refsam.cli.segment import load_model
    from refsam.ui.jobs import Engine

    model, precision = load_model(choice, choose_device(device), dtype)
    return Engine(choice.checkpoint, model, precision)
