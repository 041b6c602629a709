"""The command line as a whole: help, version, information, light start."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from refsam import __version__
from refsam.cli import main


def test_version() -> None:
    result = CliRunner().invoke(main, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"refsam {__version__}\n")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0
    for command in ("segment", "demo", "info", "convert"):
        assert f" {command} " in result.stdout


def _commands(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command below this one, and the words that call it."""
    yield words, command
    if hasattr(command, "list_commands"):
        for name in command.list_commands(typer.Context(command)):
            yield from _commands(command.get_command(typer.Context(command), name), (*words, name))


def test_every_command_explains_itself_and_its_options() -> None:
    found = dict(_commands(typer.main.get_command(main)))
    assert {("segment",), ("evaluate", "mevis"), ("convert", "sam"), ("data", "check")} <= set(
        found
    )
    for words, command in found.items():
        assert command.help, words
        assert not [option.name for option in command.params if not option.help], words
        result = CliRunner().invoke(main, [*words, "--help"])
        assert result.exit_code == 0
        assert "Usage: refsam" in result.stdout
        assert not words or "completion" not in result.stdout


def test_misspelt_command() -> None:
    result = CliRunner().invoke(main, ["segmen"])
    assert result.exit_code == 2
    assert result.stderr == "refsam: No such command 'segmen' (see refsam --help)\n"


def test_info_names_versions_and_backends() -> None:
    result = CliRunner().invoke(main, ["info"])
    assert result.exit_code == 0, result.output
    for part in (f"refsam {__version__}", "torch ", "--device auto is ", "rel_pos_attention"):
        assert part in result.stdout


@pytest.mark.parametrize(
    ("code", "unwanted"),
    [
        (
            "import refsam.cli; refsam.cli.main(['segment', '--help'], standalone_mode=False)",
            {"torch", "numpy", "av", "PIL"},
        ),
        (
            "import refsam.cli.segment, refsam.session, refsam.video, refsam.model",
            {"transformers", "scipy", "matplotlib", "triton", "refsam.training", "refsam.data"},
        ),
    ],
)
def test_nothing_is_imported_before_it_is_needed(
    code: str, unwanted: set[str], tmp_path: Path
) -> None:
    program = (
        f"import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); {code}"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert not unwanted & set(result.stderr.split())


def commands_below(command: Any, name: str = "refsam") -> Iterator[tuple[str, Any]]:
    """A command and all its sub-commands, by their words."""
    yield name, command
    if hasattr(command, "list_commands"):
        context = typer.Context(command)
        for each in command.list_commands(context):
            yield from commands_below(command.get_command(context, each), f"{name} {each}")


def test_brackets_in_help_are_shown() -> None:
    """Rich takes '[semantic]' for markup and drops it unless texts are Markdown."""
    shown = 0
    for name, command in commands_below(typer.main.get_command(main)):
        texts = [command.help or "", *(getattr(p, "help", None) or "" for p in command.params)]
        if any("[" in text for text in texts):
            assert command.rich_markup_mode == "markdown", name
            shown += 1
    assert shown > 3
