"""The bundled model knows every word of the expressions that help, page, README and docs show; it takes frames of every shape."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from refsam import VideoSession
from refsam.data.photographs.sample import EXPRESSIONS as PHOTOGRAPHED
from refsam.model import RefSAM
from refsam.session.preparation import prepare_now
from refsam.session.video_session import image_features
from refsam.ui.sample import EXPRESSIONS as DRAWN

ROOT = Path(__file__).resolve().parents[1]
SHOWN = ("README.md", "docs/masks.md", "docs/ui.md", "docs/errors.yaml", "docs/troubleshooting.md")
CODE = (
    "refsam/cli/__init__.py",
    "refsam/cli/segment.py",
    "refsam/cli/segment_videos.py",
    "refsam/ui/uploads.py",
)


def shown() -> dict[str, str]:
    """Expression to the file that shows it: what `--text` is given, lists in Python, the page's placeholder.

    A line that names a checkpoint is about another model.
    """
    found: dict[str, str] = {}
    for name in (*SHOWN, *CODE):
        lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
        text = "\n".join(line for line in lines if "--checkpoint" not in line)
        quoted = re.findall(r"--text ([\"'])(\w[^\"']*)\1", text)
        listed = re.findall(r"\[(\"the [^\]\n]*\")\]", text)
        words = [e for _, e in quoted] + [
            e.strip('" ') for row in listed for e in row.split('", "')
        ]
        found |= dict.fromkeys(words, name)
    page = (ROOT / "refsam/ui/page.py").read_text(encoding="utf-8")
    (placeholder,) = re.findall(r'placeholder="([^"]+)"', page)
    found |= dict.fromkeys(placeholder.split("\\n"), "refsam/ui/page.py")
    return found | dict.fromkeys((*DRAWN, *PHOTOGRAPHED), "the samples")


@pytest.fixture(scope="module")
def nano() -> RefSAM:
    return RefSAM.from_pretrained("nano")


def test_shown_expressions_are_found_in_the_files() -> None:
    assert {"the red car", "the dog", *DRAWN, *PHOTOGRAPHED} <= shown().keys()


def test_bundled_model_knows_every_word_that_is_shown(nano: RefSAM) -> None:
    expressions = [e for e in shown() if "..." not in e]
    unknown = nano.text_encoder(expressions).unknown
    assert not {
        e: (words, shown()[e]) for e, words in zip(expressions, unknown, strict=True) if words
    }


@pytest.mark.parametrize(
    "size", [(4320, 7680), (90, 360), (360, 90), (64, 64), (16, 64), (320, 180), (181, 181)]
)
def test_finds_a_figure_in_frames_of_every_shape(nano: RefSAM, size: tuple[int, int]) -> None:
    """8K, panorama and tower, 64 pixels, a strip, portrait, square."""
    height, width = size
    side, top, left = min(size) // 3, height // 3, width // 5
    frame, truth = np.full((*size, 3), 110, np.uint8), np.zeros(size, bool)
    truth[top : top + side, left : left + side] = True
    frame[truth] = (210, 30, 30)
    masks = VideoSession(nano, ["the red square", "the blue circle"]).step(frame).masks.numpy()
    assert masks.shape == (2, *size)
    assert (masks[0] & truth).sum() > 0.7 * (masks[0] | truth).sum()
    assert not masks[1].any()


def test_frames_encoded_together_have_the_bits_of_single_ones(nano: RefSAM) -> None:
    """So that the masks of a file do not depend on how many frames had been read when a thread took them."""
    session = VideoSession(nano, ["the dog"])
    noise = np.random.default_rng(0).integers(0, 256, (4, 90, 160, 3), np.uint8)
    ready = [prepare_now(nano, frame) for frame in noise]
    with torch.no_grad():
        single = [image_features(session._runner, [frame]) for frame in ready]
        for count in (2, 3, 4):
            together = image_features(session._runner, ready[:count]).split()
            for alone, beside in zip(single, together, strict=False):
                torch.testing.assert_close(alone, beside, rtol=0, atol=0)
