"""Draw the sample clip again."""

import av

from refsam.data.generated import generate_clip
from refsam.ui.sample import CLIP, EXPRESSIONS

_SEED = 2
_FRAMES = 36
_SIZE = (360, 640)
_FPS = 12


def main() -> None:
    """Draw, encode and check that the expressions are still those of the clip."""
    clip = generate_clip(seed=_SEED, frames=_FRAMES, size=_SIZE)
    if tuple(clip.expressions) != EXPRESSIONS:
        raise SystemExit(
            f"the clip's expressions are now {clip.expressions}: put them into EXPRESSIONS"
        )
    with av.open(str(CLIP), "w") as container:
        stream = container.add_stream("libx264", rate=_FPS)
        stream.height, stream.width = _SIZE
        stream.pix_fmt = "yuv420p"
        for image in clip.frames.numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


if __name__ == "__main__":
    main()
