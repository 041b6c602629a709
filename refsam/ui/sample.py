"""A clip to try the page with: generated, so that the bundled model knows what is in it."""

import json
from fractions import Fraction
from pathlib import Path

import av

_SEED = 2
_FRAMES = 36
_SIZE = (360, 640)
_FPS = 12


def write_sample(folder: Path) -> tuple[Path, list[str]]:
    """The clip ``sample.mp4`` in ``folder``, drawn unless it is there, and expressions about it."""
    clip, notes = folder / "sample.mp4", folder / "sample.json"
    if not notes.exists():
        from refsam.data.generated import generate_clip

        drawn = generate_clip(seed=_SEED, frames=_FRAMES, size=_SIZE)
        folder.mkdir(exist_ok=True)
        with av.open(str(clip), "w") as container:
            stream = container.add_stream("libx264", rate=Fraction(_FPS))
            stream.height, stream.width = _SIZE
            stream.pix_fmt = "yuv420p"
            for image in drawn.frames.numpy():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
        notes.write_text(json.dumps(list(drawn.expressions)), encoding="utf-8")
    return clip, json.loads(notes.read_text(encoding="utf-8"))
