"""The benchmark of cut-outs: repeatable, its expressions true, and scored as it says."""

from pathlib import Path

import numpy as np
import pytest
import torch

from refsam.config import RefSAMConfig
from refsam.data import DataError
from refsam.data.photographs.scenes import SceneDrawer
from refsam.evaluation.runners import composites
from refsam.evaluation.runners.composites import (
    COVERED,
    KINDS,
    CompositeScore,
    composite_clip,
    evaluate_composites,
    summarise,
    val_drawer,
)
from refsam.model import RefSAM, word_tokenizer
from tests.data.photograph_fixtures import (
    ONE_CAT,
    ONE_DOG,
    write_lines,
    write_photograph,
    write_photographs,
)
from tests.training.test_loop import TINY


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_photographs(tmp_path_factory.mktemp("val"))
    boxes = (ONE_CAT, ONE_DOG) * 4
    rows = [write_photograph(folder, f"v{n}", box, split="val") for n, box in enumerate(boxes)]
    write_lines(folder / "manifest.jsonl", rows)
    return folder


@pytest.fixture(scope="module")
def drawer(root: Path) -> SceneDrawer:
    return val_drawer(root)


@pytest.mark.parametrize("kind", [*KINDS, COVERED])
def test_clip_is_drawn_from_its_number_alone(drawer: SceneDrawer, root: Path, kind: str) -> None:
    first, again = composite_clip(drawer, kind, 3), composite_clip(val_drawer(root), kind, 3)
    assert first.text == again.text and np.array_equal(first.frames, again.frames)
    assert not np.array_equal(first.mask, composite_clip(drawer, kind, 4).mask)
    assert not (first.mask & first.ignore).any()


def test_expressions_of_place_size_and_order_are_true(drawer: SceneDrawer, monkeypatch) -> None:
    clips = []
    monkeypatch.setattr(
        composites, "_clip", lambda clip, text, number: clips.append((clip, number)) or clip
    )
    for kind in KINDS:
        for index in range(4):
            composite_clip(drawer, kind, index)
            clip, number = clips[-1]
            pixels = [np.argwhere(clip.owner[0] == n)[:, 1] for n in (1, 2, 3)]
            by_place = np.argsort([p.mean() for p in pixels])
            by_size = np.argsort([len(p) for p in pixels])
            wanted = {
                "left": by_place[0],
                "right": by_place[2],
                "second": by_place[1],
                "largest": by_size[2],
            }
            assert number - 1 == wanted[kind], (kind, index)


def test_covered_object_is_away_for_ten_frames(drawer: SceneDrawer) -> None:
    clip = composite_clip(drawer, COVERED, 0)
    hidden = np.flatnonzero(~clip.mask.any((1, 2)))
    assert len(hidden) == 10 and hidden[0] > 0 and hidden[-1] < 23
    assert clip.text in ("the red cat", "the white dog", "the cat", "the dog")


def test_evaluation_is_repeatable_and_by_kind(root: Path) -> None:
    torch.manual_seed(0)
    words = "the on left right largest second from cat dog red white".split()
    model = RefSAM(RefSAMConfig.from_dict(TINY), tokenizer=word_tokenizer(words)).eval()
    result, again = (evaluate_composites(model, root, clips=1) for _ in range(2))
    assert result == again and len(result["sentences"]) == 5
    assert set(result["summary"]["J"]) == {*KINDS, COVERED}


def test_summary_keeps_covered_objects_apart() -> None:
    scores = [
        CompositeScore("left", 0, "", 0.5, None),
        CompositeScore("right", 0, "", 0.7, None),
        CompositeScore(COVERED, 0, "", 0.1, 0.02),
    ]
    summary = summarise(scores)
    assert summary["told apart"] == pytest.approx(0.6)
    assert summary["false_area while covered"] == pytest.approx(0.02)


def test_folder_without_enough_cut_outs_is_told(tmp_path: Path) -> None:
    whole = ((1, (9, 9, 9), 0, 0, 72, 96),)
    rows = [write_photograph(tmp_path, f"one{n}", whole, split="val") for n in range(4)]
    write_lines(tmp_path / "manifest.jsonl", rows)
    (tmp_path / "classes.json").write_text('{"1": "dog"}')
    with pytest.raises(DataError, match="no clip of the kind left"):
        composite_clip(val_drawer(tmp_path), "left", 0)
