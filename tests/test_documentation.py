"""README and docs: their code runs, their commands exist, their tables are complete, and the site builds without a warning."""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
import yaml

from refsam.cli import main
from tests.kernels.test_integrations import pixels_of, sam
from tests.video.clips import write_video

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
OPERATORS = sorted(p.parent.name for p in ROOT.glob("kernels/refsam_kernels/*/README.md"))
PROGRAMS = ("refsam", "python", "make", "pip", "torchrun")
FENCE = re.compile(r"^(<!-- run: no -->\n)?```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A block of code: where it is, its language, its text, and whether it can run without files that nobody has here."""

    place: str
    language: str
    text: str
    runs: bool


def blocks() -> Iterator[Block]:
    """Every block of README and docs."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            line = text.count("\n", 0, match.start(3))
            place = f"{page.relative_to(ROOT)}:{line}"
            yield Block(place, match[2], match[3], match[1] is None)


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a block that are known here; brackets around what may be left out are dropped."""
    for line in re.sub(r"\n +", " ", text).splitlines():
        for part in line.split(" && "):
            if part.split(" ")[0] in PROGRAMS:
                part = re.sub(r"(?<= )\[(?=-)|\]+(?= |$)| \.\.\.", "", part)
                yield shlex.split(part, comments=True)


PYTHON = [block for block in blocks() if block.language == "python"]
COMMANDS = [
    pytest.param(words, id=f"{block.place} {' '.join(words[:3])}")
    for block in blocks()
    if not block.language
    for words in commands(block.text)
]


@pytest.mark.parametrize("block", [pytest.param(b, id=b.place) for b in PYTHON if b.runs])
def test_python_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that holds a clip, with a SAM of segment-anything's at hand."""
    write_video(tmp_path / "clip.mp4", frames=2)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "example"}
    if "optimize(sam)" in block.text:
        names |= {"sam": sam(), "pixels": pixels_of()}
    exec(compile(block.text, block.place, "exec"), names)


def test_enough_python_runs() -> None:
    assert sum(block.runs for block in PYTHON) >= 7


def parse(words: list[str]) -> None:
    """Parse a command line of refsam, down to the last sub-command, without running it."""
    command: Any = typer.main.get_command(main)
    context = command.make_context("refsam", words[1:])
    while hasattr(command, "get_command"):
        rest = [*context._protected_args, *context.args]
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("words", COMMANDS)
def test_commands_exist_and_have_these_options(words: list[str]) -> None:
    if words[0] == "torchrun":
        words = words[words.index("refsam") :]
    program, *rest = words
    if program == "refsam":
        parse(["1" if word == "N" else word for word in words])
    elif program == "python" and rest[0] == "-m":
        assert importlib.util.find_spec(rest[1]), f"no module {rest[1]}"
    elif program == "make":
        makefile = (ROOT / "Makefile").read_text()
        targets = [word for word in rest if "=" not in word]
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    elif program == "pip":
        extras = set(re.findall(r"\[([\w,]+)\]", " ".join(rest)))
        known = (ROOT / "pyproject.toml").read_text()
        names = {name for group in extras for name in group.split(",")}
        assert all(re.search(rf"^{name} = \[", known, re.MULTILINE) for name in names)


def test_commands_with_misspelt_options_would_be_noticed() -> None:
    with pytest.raises(Exception, match="--txt"):
        parse(["refsam", "segment", "clip.mp4", "--txt", "the dog", "--out", "out"])
    with pytest.raises(Exception, match="evaluat"):
        parse(["refsam", "evaluat", "masks"])
    text = "refsam evaluate masks --pred DIR [--protocol NAME]\n        [--report DIR [--frames DIR]] [--processes N]\n"
    words = [
        "--pred",
        "DIR",
        "--protocol",
        "NAME",
        "--report",
        "DIR",
        "--frames",
        "DIR",
        "--processes",
        "N",
    ]
    assert list(commands(text)) == [["refsam", "evaluate", "masks", *words]]


TRAINING = [c.values[0] for c in COMMANDS if c.values[0][:2] == ["refsam", "train"]]


@pytest.mark.parametrize("words", [w for w in TRAINING if (ROOT / w[2]).is_file()], ids=" ".join)
def test_training_commands_have_valid_configurations(words: list[str]) -> None:
    from refsam.training.settings import TrainingSettings

    TrainingSettings.from_yaml(ROOT / words[2], words[3:])


def test_links_of_the_readme_lead_somewhere() -> None:
    """mkdocs follows those of the docs."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    assert len(targets) > 8
    assert not [target for target in targets if not (ROOT / target).exists()]


def variables_read() -> set[str]:
    """The environment variables that the packages read, directly or by a constant called ...VARIABLE."""
    names = set()
    for path in [*(ROOT / "refsam").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names |= variables_of(node)
    return names


def variables_of(node: ast.AST) -> set[str]:
    """The text of one expression or assignment."""
    found: list[ast.expr] = []
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load):
        if ast.unparse(node.value) == "os.environ":
            found = [node.slice]
    elif isinstance(node, ast.Call) and node.args:
        if ast.unparse(node.func).startswith(("os.environ.", "os.getenv")):
            found = [node.args[0]]
    elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).endswith("VARIABLE"):
        found = [node.value]
    return {
        item.value
        for item in found
        if isinstance(item, ast.Constant) and isinstance(item.value, str)
    }


def test_every_environment_variable_is_documented() -> None:
    page = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    documented = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    read = variables_read()
    assert "REFSAM_BACKEND" in read and "OMP_NUM_THREADS" in read
    assert read <= documented, f"not in docs/environment.md: {sorted(read - documented)}"
    code = "".join(
        p.read_text(encoding="utf-8")
        for folder in ("refsam", "kernels", "tests")
        for p in (ROOT / folder).rglob("*.py")
    )
    assert not [name for name in documented if f'"{name}"' not in code]


def test_messages_in_the_table_of_errors_are_those_of_the_code() -> None:
    """That the page is made of the table is checked with the other tables, in test_benchmarks.py."""
    table = yaml.safe_load((ROOT / "docs" / "errors.yaml").read_text(encoding="utf-8"))
    errors = [error for group in table for error in group["errors"]]
    assert errors and all(error["why"] and error["do"] for error in errors)
    code = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("refsam", "kernels")
        for path in (ROOT / folder).rglob("*.py")
    )
    assert not [error["says"] for error in errors if error["says"] not in code]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with warnings as errors."""
    pytest.importorskip("mkdocstrings", reason="needs refsam[docs]")
    out = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(out),
    ]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600, env=environment
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return out


def test_the_site_asks_no_other_machine(site: Path) -> None:
    loaded = re.compile(
        r"<(?:script|img|iframe)[^>]* src=\"?(?:https?:)?//|<link[^>]* rel=\"?stylesheet\"?[^>]*//|@import url"
    )
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    assert not [page for page in pages if loaded.search(page.read_text(encoding="utf-8"))]


def test_the_site_has_every_operator_with_its_picture(site: Path) -> None:
    for name in OPERATORS:
        text = (site / "kernels" / f"{name}.html").read_text(encoding="utf-8")
        assert f"images/kernels/{name}.svg" in text
        assert (site / "images" / "kernels" / f"{name}.svg").is_file()


def test_the_reference_names_all_public_functions(site: Path) -> None:
    import refsam
    import refsam_kernels

    internal = {
        "resize_table",
        "decompositions",
        "PackedLinear",
        "can_prepack",
        "has_bfloat16",
        "say_if_slow",
        "Fingerprint",
        "__version__",
    }
    internal |= {"is_capturing", "settle"}  # streams and graphs, for sessions
    for package in (refsam, refsam_kernels):
        text = (site / "reference" / f"{package.__name__}.html").read_text(encoding="utf-8")
        shown = {match.rpartition(".")[2] for match in re.findall(r"id=\"?([\w.]+)", text)}
        assert set(package.__all__) - internal <= shown
