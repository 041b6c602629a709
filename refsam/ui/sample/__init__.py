"""A clip to try the page with. `python -m refsam.ui.sample` draws it: the bundled model knows what is in generated clips.

It is kept as a file, because drawing it takes too long for a visitor.
"""

from pathlib import Path

EXPRESSIONS = ("the glass that is red", "the rectangle that is golden")
CLIP = Path(__file__).parent / "sample.mp4"
