"""The expressions that help, page, README and docs show are ones that the bundled model was taught, word by word."""

import re
from pathlib import Path

import pytest

from refsam.data.photographs.sample import EXPRESSIONS as PHOTOGRAPHED
from refsam.model import RefSAM
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
