"""The server of the page: it first begins to answer and then loads the model."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from refsam.errors import UserError
from refsam.runtime.signals import termination_interrupts
from refsam.ui.jobs import Engine
from refsam.ui.uploads import Limits
from refsam.ui.visitors import Visitors


def serve(
    load: Callable[[], Engine],
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    folder: Path | None = None,
    limits: Limits | None = None,
    announce: Callable[[str], None] = print,
) -> None:
    """Show the page until Ctrl-C; then remove all uploads and results.

    Args:
        load: makes the model; it is called once the server answers.
        host: address to listen at; 127.0.0.1 is this machine alone.
        port: to listen at; None for the first free one from 7860 on.
        folder: the place for a temporary folder with all files; None for the system's own.
        limits: on uploads.
        announce: is called with each line to print.

    Raises:
        UserError: gradio or pycocotools is missing, the address cannot be used, or the model cannot be loaded.
    """
    try:
        workplace = TemporaryDirectory(None, "refsam-ui-", folder, ignore_cleanup_errors=True)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}): give another --folder"
        ) from error
    with workplace as place, termination_interrupts():
        visitors = Visitors(Path(place).resolve(), limits or Limits())
        page = _open(visitors, host, port)
        try:
            announce(f"refsam ui: {page.local_url} (Ctrl-C ends it)")
            visitors.set_engine(load())
            announce("refsam ui: the model is ready")
            threading.Event().wait()
        except KeyboardInterrupt:
            return
        finally:
            visitors.close()
            # Open pages never close their connections: do not wait for them.
            page.server.force_exit = True
            page.close(verbose=False)


def _open(visitors: Visitors, host: str, port: int | None):  # type: ignore[no-untyped-def]
    """Build the page and launch its server in a thread."""
    # Read when gradio is imported and when its components are made: its files stay in our folder, and it contacts no server.
    os.environ["GRADIO_TEMP_DIR"] = str(visitors.folder)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
        import pycocotools  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install 'refsam[ui]'") from error
    from refsam.ui.page import STYLE, build_page

    try:
        page = build_page(visitors)
        page.launch(
            server_name=host,
            server_port=port,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            max_file_size=f"{visitors.limits.megabytes}mb",
            footer_links=[],
            theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            css=STYLE,
        )
    except ValueError as error:
        # gradio has checked whether the page can be reached, through a proxy if there is one.
        raise UserError(
            f"the page at {host} cannot be reached from this machine: set NO_PROXY={host}, or choose another --host"
        ) from error
    except OSError as error:
        raise UserError(
            f"{host}:{port or '7860 to 7959'} cannot be listened at: choose another --host or --port"
        ) from error
    return page
