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


def commands_below(
    command: Any, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """A command and all its sub-commands, by the words that call them."""
    yield words, command
    if hasattr(command, "list_commands"):
        context = typer.Context(command)
        for each in command.list_commands(context):
            yield from commands_below(command.get_command(context, each), (*words, each))


def test_help_explains_every_command_and_option(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every word is shown: Rich drops '[semantic]' unless texts are Markdown, and Markdown drops '<video>' outside of code."""
    monkeypatch.setenv("COLUMNS", "4000")
    found = dict(commands_below(typer.main.get_command(main)))
    assert {("segment",), ("evaluate", "mevis"), ("convert", "sam"), ("data", "check")} <= {*found}
    for words, command in found.items():
        result = CliRunner().invoke(main, [*words, "--help"])
        assert result.exit_code == 0
        assert "Usage: refsam" in result.stdout
        assert not words or "completion" not in result.stdout
        shown = result.stdout.split()
        for text in (command.help, *(option.help for option in command.params)):
            assert text, (words, "no help")
            hidden = {*text.replace("`", "").split()} - {*shown, "-"}
            assert not hidden, (words, hidden)


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
