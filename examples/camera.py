"""A camera segmented while it runs, until Ctrl-C.

    python examples/camera.py --text "the red cup" --text "the person on the left"
    python examples/camera.py --source rtsp://... --text "the dog" --save frames

The memory does not grow: one small token per expression is all that is kept from frame to frame. A frame that
comes while the last one is being worked on waits; the reader keeps a few.
"""

import argparse
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from PIL import Image

from refsam import RefSAM, VideoSession
from refsam.video import draw_overlay, open_source, prefetch


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints, frame by frame, how much of the picture each expression's object covers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default="camera:0", help="camera:N, a stream's URL or a file")
    parser.add_argument("--text", action="append", required=True, help="what to segment; repeat it")
    parser.add_argument("--checkpoint", default="nano")
    parser.add_argument("--frames", type=int, help="stop after so many")
    parser.add_argument("--save", type=Path, help="a folder for the pictures with their masks")
    options = parser.parse_args(arguments)
    session = VideoSession(RefSAM.from_pretrained(options.checkpoint), options.text)
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    count = 0
    with open_source(options.source) as source, closing(prefetch(source)) as frames:
        try:
            for frame in frames:
                result = session.step(frame.image)
                masks = result.masks.cpu().numpy()
                covered = ", ".join(
                    f"{text}: {100 * mask.mean():.1f} %"
                    for text, mask in zip(session.expressions, masks, strict=True)
                )
                print(f"{frame.time:7.2f} s  {covered}", flush=True)
                if options.save:
                    picture = draw_overlay(frame.image, masks, session.expressions)
                    Image.fromarray(picture).save(options.save / f"{frame.index:06d}.jpg")
                count += 1
                if count == options.frames:
                    break
        except KeyboardInterrupt:
            pass
    print(f"{count} frames, {count / (time.perf_counter() - started):.1f} a second")


if __name__ == "__main__":
    main()
