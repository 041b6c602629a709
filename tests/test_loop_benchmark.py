"""The command against the loop, at a tiny size: the loop's masks are the command's, and wrong masks get no time."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image

from benchmarks.end_to_end import loop
from benchmarks.end_to_end.per_expression import PerExpressionLoop
from benchmarks.report import tables
from refsam import RefSAM, VideoSession
from refsam.data.generated import generate_clip
from tests.tiny_model import tiny_model
from tests.video.clips import encode_video

EXPRESSIONS = ("the red ball", "the small blue circle on the left")
SIZE = (48, 64)


@pytest.fixture(scope="module")
def model() -> RefSAM:
    return tiny_model()


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    encode_video(path, generate_clip(seed=0, frames=3, size=SIZE).frames.numpy())
    return path


def measured(model: RefSAM, clip: Path, **changes: Any) -> dict[str, dict[str, Any]]:
    """Rows by provider and dtype, with the command in this process."""
    run = changes.get("run", loop.segment_once)
    rows = loop.measure(model, clip, EXPRESSIONS, rounds=1, run=run)
    return {f"{row['provider']}, {row['dtype']}": row for row in rows}


def test_the_loop_gives_a_sessions_masks(model: RefSAM) -> None:
    theirs, session = PerExpressionLoop(model), VideoSession(model, EXPRESSIONS, optimize=False)
    prompts = [model.encode_text([text]) for text in EXPRESSIONS]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        frame = torch.randint(256, (*SIZE, 3), dtype=torch.uint8, generator=generator)
        logits, masks = theirs.step(frame, prompts)
        decided = logits.abs() > 1e-5 * logits.abs().max()
        assert not ((masks != session.step(frame).masks) & decided).any()
        assert 0.02 < masks.float().mean() < 0.98
        assert not torch.equal(masks[0], masks[1])


def test_rows_of_the_loop_and_the_command(model: RefSAM, clip: Path) -> None:
    rows = measured(model, clip)
    assert list(rows) == [
        "per-expression loop, float32",
        "refsam segment, float32",
        "refsam segment, auto",
    ]
    for row in list(rows.values())[1:]:
        assert "wrong" not in row and row["decided_share"] > 0.9
        assert all(0 < row[part] < row["median_ms"] for part in ("encoder_ms", "decoder_ms"))
        assert 0 < row["overhead_percent"] < 100
        assert "rest" in loop.table_line(row)
    lines = [tables._loop_line(row) for row in rows.values()]
    assert all(len(line) == 8 for line in lines)


def test_what_runs_at_once_counts_once() -> None:
    assert loop.covered([(3.0, 5.0), (1.0, 2.0)]) == 3
    assert loop.covered([(1.0, 4.0), (2.0, 3.0), (3.0, 6.0)]) == 5


def test_wrong_masks_get_no_time(model: RefSAM, clip: Path) -> None:
    def spoil(task: loop.Task) -> dict[str, float]:
        seconds = loop.segment_once(task)
        path = Path(task.out) / "masks/01/00001.png"
        with Image.open(path) as image:
            flipped = image.convert("L").point(lambda value: 255 - value)
        if task.dtype == "auto":
            flipped.save(path)
        return seconds

    rows = measured(model, clip, run=spoil)
    row = rows["refsam segment, auto"]
    assert "decided pixels of frame 1 differ" in row["wrong"] and "median_ms" not in row
    assert "wrong" in loop.table_line(row)
    assert len(tables._loop_line(row)) == 8
    assert "wrong" not in rows["refsam segment, float32"]


def test_the_command_line_writes_rows(tmp_path: Path) -> None:
    row = {"provider": "p", "dtype": "float32", "median_ms": 1.0, "p20_ms": 1.0, "p80_ms": 1.0}
    with (
        mock.patch.object(loop, "make_model", return_value=tiny_model()),
        mock.patch.object(loop, "measure", return_value=iter([row | {"speedup": 1.0}])),
        mock.patch.object(loop, "SIZE", SIZE),
    ):
        assert loop.main(["--frames", "1", "--out", str(tmp_path / "rows.jsonl")]) == 0
    (line,) = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert json.loads(line)["provenance"]["image_size"] == 1024
