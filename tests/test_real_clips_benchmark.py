"""The comparison on real clips, on painted ones: what it takes for coloured, and what it reports."""

from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.end_to_end import real_clips
from benchmarks.end_to_end.real_clips import ROOT, coloured, mean, score, table, weights_at
from refsam.model import RefSAM
from tests.video.clips import encode_video

COLOURS = {"red": (220, 20, 30), "yellow": (230, 200, 20), "green": (30, 160, 70)}
COLOURS |= {"blue": (25, 70, 200), "blue trousers": (30, 70, 160)}


def painted(*patches: tuple[str, slice, slice], size: tuple[int, int] = (120, 160)) -> np.ndarray:
    frame = np.full((*size, 3), 25, np.uint8)
    for name, rows, columns in patches:
        frame[rows, columns] = COLOURS[name]
    return frame


@pytest.mark.parametrize("name", COLOURS)
def test_a_coloured_patch_is_found_whole_and_alone(name):
    frame = painted((name, slice(30, 80), slice(40, 100)))
    frame[50:60, 60:75] = 240  # a white letter on it
    truth = np.zeros(frame.shape[:2], bool)
    truth[30:80, 40:100] = True
    assert (coloured(frame, name) ^ truth).sum() <= 0.02 * truth.sum()
    others = {"red", "yellow", "green"} - {name}
    assert not any(coloured(frame, other).any() for other in others)


def test_of_blocks_every_large_one_counts_and_of_trousers_the_largest():
    patches = (slice(10, 50), slice(10, 50)), (slice(10, 50), slice(100, 130)), (slice(90, 95),) * 2
    blocks = coloured(painted(*(("red", *patch) for patch in patches)), "red")
    assert blocks[30, 30] and blocks[30, 115] and not blocks[92, 92]
    trousers = coloured(painted(*(("blue trousers", *patch) for patch in patches)), "blue trousers")
    assert trousers[30, 30] and not trousers[30, 115]


class ByHue:
    """A session that marks what an expression means by its hue, and for jeans everything."""

    def __init__(self, model, expressions):
        self.expressions = expressions

    def step(self, frame):
        meanings = {
            text: name for clip in real_clips.EXPRESSIONS.values() for text, name in clip.items()
        }
        nothing, everything = np.zeros(frame.shape[:2], bool), np.ones(frame.shape[:2], bool)
        masks = [
            everything
            if "jeans" in text
            else coloured(frame, meanings[text])
            if meanings[text]
            else nothing
            for text in self.expressions
        ]
        return SimpleNamespace(masks=np.stack(masks))


def test_scores_every_sentence_of_both_clips(tmp_path, monkeypatch):
    corners = slice(10, 50), slice(70, 110)
    places = [(rows, columns) for rows in corners for columns in (slice(10, 50), slice(90, 130))]
    blocks = painted(*((name, *place) for name, place in zip(COLOURS, places, strict=False)))
    trousers = painted(("blue trousers", slice(20, 100), slice(30, 110)))
    for name, frame in (("dog", trousers), ("blocks", blocks)):
        encode_video(tmp_path / f"{name}.mp4", [frame] * 9)
    monkeypatch.setattr(real_clips, "VideoSession", ByHue)
    rows = score(None, tmp_path)
    scores = {(row["clip"], row["sentence"]): row["J"] for row in rows if "J" in row}
    assert scores.pop(("dog", "the blue jeans")) == pytest.approx(80 * 80 / (120 * 160), rel=0.05)
    assert len(scores) == 12 and set(scores.values()) == {1.0}
    assert [row["false_area"] for row in rows if "false_area" in row] == [0.0] * 14


def test_the_table_has_both_models_and_their_means():
    before = [
        {"clip": "dog", "sentence": "a", "J": 0.25},
        {"clip": "dog", "sentence": "b", "J": 0.5},
    ]
    before += [{"clip": "dog", "sentence": "c", "false_area": 0.001}]
    now = [row | ({"J": 0.75} if "J" in row else {"false_area": 0.0}) for row in before]
    lines = table(before, now).splitlines()
    assert lines[2:4] == ["| a | dog | 0.250 | 0.750 |", "| b | dog | 0.500 | 0.750 |"]
    assert lines[4] == "| mean J | | 0.375 | 0.750 |"
    assert lines[5] == "| marked for 1 absent objects, % of the frame | | 0.100 | 0.000 |"
    assert mean(before, "J") == 0.375


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a checkout")
def test_weights_of_a_commit_are_those_it_holds(tmp_path):
    assert len(weights_at("HEAD", tmp_path)) == 40
    bundled = ROOT / "refsam/weights/nano/tokenizer.json"
    assert (tmp_path / "tokenizer.json").read_bytes() == bundled.read_bytes()
    assert RefSAM.from_pretrained(str(tmp_path)).config == RefSAM.from_pretrained("nano").config
