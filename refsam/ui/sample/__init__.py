"""A clip to try the page with. `python -m refsam.ui.sample` draws it: the bundled model knows what is in generated clips.

It is kept as a file, because drawing it takes too long for a visitor.
"""

import shutil
from pathlib import Path

EXPRESSIONS = ("the glass that is red", "the rectangle that is golden")
CLIP = Path(__file__).parent / "sample.mp4"


def put_sample(folder: Path) -> Path:
    """The path of a copy of the clip in `folder`, which is made once."""
    clip = folder / CLIP.name
    if not clip.exists():
        folder.mkdir(exist_ok=True)
        shutil.copyfile(CLIP, clip)
    return clip
