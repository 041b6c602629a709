"""`refsam data check` of a folder of photographs: everything wrong with it is told at once."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from refsam.cli.data import app
from refsam.data.check import Finding, check, recognise
from tests.data.photograph_fixtures import SIZE, write_lines, write_photographs

Rows = list[dict[str, object]]


def rows_of(root: Path) -> Rows:
    return [json.loads(line) for line in (root / "manifest.jsonl").read_text().splitlines()]


def change(root: Path, change_rows: Callable[[Rows], None]) -> None:
    rows = rows_of(root)
    change_rows(rows)
    write_lines(root / "manifest.jsonl", rows)


def save(root: Path, name: str, values: np.ndarray) -> None:
    Image.fromarray(values).save(root / name)


def findings(root: Path, decode: bool = False) -> dict[tuple[str, str], Finding]:
    return {(f.split, f.part): f for f in check("photographs", root, decode=decode)}


def test_whole_folder_is_recognised_and_counted(tmp_path: Path) -> None:
    root = write_photographs(tmp_path)
    assert recognise(root) == ("photographs",)
    found = findings(root, decode=True)
    assert {f.state for f in found.values()} == {"ok"}
    assert found["train", "photographs"].detail == "16 photographs"
    assert found["train", "instances"].detail == "2 instances"
    assert found["val", "labels"].detail == "1 labels"
    assert found["every", "classes"].detail == "6 classes; no words of the list: drone"


SPOILED: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "no licence": (
        lambda root: change(root, lambda rows: rows[0].pop("licence")),
        "photographs",
        "line 1: images/dog0.png: no licence",
    ),
    "empty licence and source": (
        lambda root: change(root, lambda rows: rows[1].update(licence=" ", source=None)),
        "photographs",
        "line 2: images/dog1.png: no source, licence",
    ),
    "unknown class": (
        lambda root: save(root, "labels/dog0.png", np.full(SIZE, 99, np.uint8)),
        "labels",
        "labels/dog0.png: number 99 not in classes.json",
    ),
    "another size": (
        lambda root: save(root, "labels/dog1.png", np.ones((10, 20), np.uint8)),
        "labels",
        "labels/dog1.png is 20x10, its image 96x72",
    ),
    "colour label": (
        lambda root: save(root, "labels/dog2.png", np.ones((*SIZE, 3), np.uint8)),
        "labels",
        "labels/dog2.png",
    ),
    "empty label": (
        lambda root: save(root, "labels/dog3.png", np.zeros(SIZE, np.uint8)),
        "labels",
        "labels/dog3.png: shows no class",
    ),
    "wrong share": (
        lambda root: change(root, lambda rows: rows[4].update(classes={"1": 0.9})),
        "labels",
        "labels/dog4.png: class 1 covers",
    ),
    "classes of another form": (
        lambda root: change(root, lambda rows: rows[5].update(classes=["dog"])),
        "labels",
        "labels/dog5.png: classes are ['dog']",
    ),
    "no image": (
        lambda root: (root / "images/dog6.png").unlink(),
        "photographs",
        "dog6.png",
    ),
    "no label": (lambda root: (root / "labels/dog7.png").unlink(), "labels", "dog7.png"),
    "size that is not listed": (
        lambda root: change(root, lambda rows: rows[6].update(width=5, height=5)),
        "photographs",
        "line 7: 5x5 are listed, images/dog6.png is 96x72",
    ),
    "object on nothing": (
        lambda root: save(root, "instances/cats0.png", np.full(SIZE, 7, np.uint8)),
        "instances",
        "instances/cats0.png: number 7 where the label shows nothing",
    ),
    "unknown garment": (
        lambda root: save(root, "parts/person0.png", np.full(SIZE, 77, np.uint8)),
        "parts",
        "parts/person0.png: number 77, want 0 to 58",
    ),
    "file outside": (
        lambda root: change(root, lambda rows: rows[7].update(image="../../secret.png")),
        "photographs",
        "../../secret.png: lies outside",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_each_fault_is_told_at_its_part(tmp_path: Path, name: str) -> None:
    spoil, part, wanted = SPOILED[name]
    root = write_photographs(tmp_path)
    spoil(root)
    found = findings(root)
    assert found["train", part].state == "broken" and wanted in found["train", part].detail
    assert all(f.state == "ok" for key, f in found.items() if key != ("train", part))


def test_all_faults_are_told_at_once_and_the_exit_code_is_two(tmp_path: Path) -> None:
    root = write_photographs(tmp_path)
    for name in ("no licence", "unknown class", "object on nothing", "unknown garment"):
        SPOILED[name][0](root)
    result = CliRunner().invoke(app, ["check", str(root)])
    assert result.exit_code == 2
    for text in ("no licence", "number 99", "number 7", "number 77", "docs/data.md"):
        assert text in result.output


@pytest.mark.parametrize(
    ("name", "content"), [("classes.json", "[]"), ("classes.json", "{"), ("manifest.jsonl", "{")]
)
def test_unreadable_lists_are_findings(tmp_path: Path, name: str, content: str) -> None:
    root = write_photographs(tmp_path)
    (root / name).write_text(content)
    found = findings(root)
    part = "classes" if name == "classes.json" else "lists"
    assert found["every", part].state == "broken" and name in found["every", part].detail


def test_decode_finds_a_damaged_image(tmp_path: Path) -> None:
    root = write_photographs(tmp_path)
    path = root / "images/dog0.png"
    path.write_bytes(path.read_bytes()[:-200])
    assert "dog0.png" in findings(root, decode=True)["train", "photographs"].detail
