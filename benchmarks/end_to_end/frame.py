"""`python -m benchmarks.end_to_end.frame --out FILE`: the stages of a 720p frame by nano, one expression.

Each stage by itself runs over the frames of a clip and is measured by the processor time of all threads, in milliseconds of one
core for each frame; medians of the runs. `benchmarks.end_to_end.segment` measures the whole command.
"""

import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.end_to_end.segment import write_clip
from benchmarks.programs import make_parser, report_medians
from refsam import RefSAM
from refsam.model.features import ImageFeatures, MaskOutput, TextPrompt
from refsam.runtime.malloc import keep_freed_memory
from refsam.runtime.threads import choose_threads
from refsam.video import Frame, ResultWriter, draw_overlay, open_source
from refsam_kernels import mask_postprocess

FRAMES = 72
RUNS = 3
Pairs = list[tuple[Frame, np.ndarray]]


@torch.no_grad()
def stages(model: RefSAM, clip: Path, expression: str) -> dict[str, float]:
    """Core-milliseconds of each stage of a frame."""
    found: dict[str, float] = {}

    def measured(name: str, work: Callable[[], Any]) -> Any:
        started = time.process_time()
        result = work()
        found[name] = 1000 * (time.process_time() - started) / FRAMES
        return result

    with open_source(clip) as source:
        frames = measured("decoding, RGB", lambda: list(islice(source, FRAMES)))
    images = [torch.from_numpy(frame.image)[None] for frame in frames]
    prepared = measured("resize, normalise, pad", lambda: [model.preprocess(i) for i in images])
    encoded = measured("image encoder", lambda: [model.encode_image(x) for x, _ in prepared])
    text = measured("text", lambda: [model.encode_text([expression]) for _ in frames])[0]
    outputs = measured("decoder", lambda: decode_all(model, encoded, text))
    size = prepared[0][1]

    def to_mask(logits: Tensor) -> np.ndarray:
        sizes: Any = {"input_size": size.resized, "output_size": size.original}
        return mask_postprocess(logits, image_size=model.image_size, **sizes).numpy()

    masks = measured("masks at the frame's size", lambda: [to_mask(o.logits) for o in outputs])
    pairs = list(zip(frames, masks, strict=True))
    caption = [f"{expression}   0.97"]
    measured("drawing", lambda: [draw_overlay(f.image, mask, caption) for f, mask in pairs])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        measured("PNG", lambda: write(out / "masks", expression, False, pairs))
        measured("all writing", lambda: write(out / "all", expression, True, pairs))
    found["H.264"] = found.pop("all writing") - found["PNG"] - found["drawing"]
    return found


def decode_all(model: RefSAM, encoded: list[ImageFeatures], text: TextPrompt) -> list[MaskOutput]:
    """The decoder's outputs, each with the track token of the one before."""
    outputs, track = [], None
    for image in encoded:
        outputs.append(model.decode(image, text, None, track))
        track = outputs[-1].track_token
    return outputs


def write(out: Path, expression: str, overlay: bool, pairs: Pairs) -> None:
    """Write masks, the overlay if wanted, and result.json of these frames."""
    rate = Fraction(30)
    with ResultWriter(out, [expression], fps=rate, time_base=1 / rate, overlay=overlay) as writer:
        for frame, mask in pairs:
            writer.write(frame, mask, np.ones(1, np.float32))
        writer.finish()


def main() -> None:
    """Measure, print and write."""
    arguments = make_parser(__file__, __doc__).parse_args()
    keep_freed_memory()
    # As the command does.
    model = RefSAM.from_pretrained("nano").eval().optimize(fixed_weights=True)
    choose_threads(model.device, model.config.image_encoder.multiplications)
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        expression = write_clip(clip, FRAMES)
        stages(model, clip, expression)  # weights are packed, caches filled
        report_medians(arguments, [stages(model, clip, expression) for _ in range(RUNS)])


if __name__ == "__main__":
    main()
