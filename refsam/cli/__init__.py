"""The command line, ``refsam``: parse, call, print.

Each sub-command is a module of this package that holds a typer application called ``app``. It is imported
when it is asked for, and imports what it needs when it runs: ``refsam segment`` never waits for training.
"""

import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from refsam import __version__, renamed
from refsam.errors import UserError

_COMMANDS = "segment segment-videos demo train evaluate data convert info bench export ui".split()
_ROOT_OPTIONS = ("install_completion", "show_completion")  # typer gives them to every application
# typer brings its own copy of click since 0.20, so the exceptions are found from typer's side.
_CommandLineError: Any = typer.BadParameter.__mro__[2]


class CommandLine(TyperGroup):
    """Load sub-commands on demand; turn errors that a user can correct into one line and exit code 2."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of all sub-commands."""
        return [name for name in _COMMANDS if find_spec(_module(name))]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The sub-command of that name, imported now; None where there is none."""
        if cmd_name not in self.list_commands(ctx):
            return None
        command = typer.main.get_command(import_module(_module(cmd_name)).app)
        command.name = cmd_name
        command.params = [param for param in command.params if param.name not in _ROOT_OPTIONS]
        return command

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        """Run the command line and exit: 0, 2 (an error to correct), 130 (interrupted) or 128 plus the number of a signal.

        ``--debug``, anywhere on the line, shows tracebacks.
        """
        words = list(sys.argv[1:] if args is None else args)
        debug = "--debug" in words
        options["standalone_mode"] = False
        words = [word for word in words if word != "--debug"]
        # Without this a name that is not UTF-8 could not be printed.
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        try:
            with _old_names_in_one_line():
                code = super().main(renamed.command_line(words), *rest, **options)
        except (KeyboardInterrupt, typer.Abort) as error:
            interrupt = error if isinstance(error, KeyboardInterrupt) else error.__cause__
            number = getattr(interrupt, "number", signal.SIGINT)
            typer.echo(
                f"refsam: {str(interrupt or '') or 'interrupted'}; nothing is kept", err=True
            )
            code = 128 + number
        except Exception as error:
            message = _message(error)
            if debug or message is None:
                raise
            if message:  # empty where the help was shown instead
                typer.echo(f"refsam: {message}", err=True)
            code = 2
        sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def _old_names_in_one_line() -> Iterator[None]:
    """Print the warnings about old names as the command line prints errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", renamed.RenamedWarning)
        show = warnings.showwarning

        def show_line(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
            if issubclass(category, renamed.RenamedWarning):
                typer.echo(f"refsam: {message}", err=True)
            else:
                show(message, category, *rest, **more)

        warnings.showwarning = show_line
        yield


def _module(command: str) -> str:
    return f"{__name__}.{command.replace('-', '_')}"


main = typer.Typer(
    name="refsam",
    cls=CommandLine,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"refsam {__version__}")
        raise typer.Exit()


@main.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks; works anywhere on the line.")] = False,
) -> None:  # fmt: skip
    """Say what you want segmented in a video; get its masks, frame by frame.

    Try `refsam demo`, then `refsam segment clip.mp4 --text "the red car" --out out`.
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _message(error: Exception) -> str | None:
    """One line for an error that the user can correct, None for any other."""
    name = type(error).__name__  # so that packages are not imported only to know their errors
    if isinstance(error, _CommandLineError):
        text = error.format_message()
        context = getattr(error, "ctx", None)
        if text and context is not None:
            text = f"{text.rstrip('.')} (see {context.command_path} --help)"
    elif isinstance(error, UserError) or name == "BackendError":  # REFSAM_BACKEND cannot run here
        text = str(error)
    elif isinstance(error, OSError) and error.strerror:
        text = f"{error.filename or 'a file'}: {error.strerror}"
    elif name == "OutOfMemoryError":
        text = "the GPU has too little memory: use a smaller model or --device cpu"
    else:
        return None
    return " ".join(text.split())
