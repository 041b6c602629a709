"""`python -m benchmarks.end_to_end.mask_generator --out FILE.jsonl`: segment-anything's automatic masks by `optimize()`.

A batch of 64 points gives 192 masks. Given logits, smooth as a trained decoder's, replace the decoder: only the way from there
to run lengths, boxes and stability is measured. The masks of both ways are compared before they are timed in turn. Times
are processor time of one thread, so that other work of the machine is not in them.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import peak_memory, take_turns
from benchmarks.programs import make_parser, write_rows
from refsam_kernels.integrations import optimize
from tests.sam_modeling import load_sam_modeling, sam_image_encoder
from tests.timm_modeling import torchvision_to_import

MASKS = 3  # of a point
SIZE, FRAME = 1024, (720, 1280)
WIDTH = 32  # of a model that is used for the sizes of its images only
MOST_DIFFERENT = 1e-6  # share of pixels, about the threshold
KEPT: dict[str, Any] = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}  # every mask


def smooth_logits(points: int) -> Tensor:
    """Logits (points, 3, 256, 256) of a few blobs each."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(points, MASKS, 8, 8, generator=generator)
    return 8 * torch.nn.functional.interpolate(coarse, (SIZE // 4, SIZE // 4), mode="bicubic")


def batch_of(logits: Tensor, *, optimized: bool) -> Callable[[], Any]:
    """A `SamAutomaticMaskGenerator`'s work on a batch of points for which its decoder gives these logits."""
    with torchvision_to_import():
        from segment_anything import SamAutomaticMaskGenerator
    modeling, grid = load_sam_modeling(), SIZE // 16
    encoder = sam_image_encoder(
        img_size=SIZE, patch_size=16, embed_dim=WIDTH, depth=1, num_heads=1, window_size=14,
        global_attn_indexes=(), out_chans=WIDTH,
    )  # fmt: skip
    prompts = modeling.PromptEncoder(
        embed_dim=WIDTH, image_embedding_size=(grid, grid), input_image_size=(SIZE, SIZE), mask_in_chans=4
    )  # fmt: skip
    transformer = modeling.TwoWayTransformer(2, WIDTH, num_heads=4, mlp_dim=WIDTH)
    decoder = modeling.MaskDecoder(transformer_dim=WIDTH, transformer=transformer)
    generator = SamAutomaticMaskGenerator(modeling.Sam(encoder, prompts, decoder), **KEPT)
    scale = SIZE / max(FRAME)
    pixels = torch.zeros(1, 3, *(round(scale * side) for side in FRAME))
    generator.predictor.set_torch_image(pixels, FRAME)
    if optimized:
        optimize(generator, check=False)
    scores = torch.linspace(0.1, 1, logits[:, :, 0, 0].numel()).view(logits.shape[:2])
    decoder.forward = lambda **_: (logits, scores)
    points = np.random.default_rng(0).uniform(0, FRAME[0], (len(logits), 2))
    crop = [0, 0, FRAME[1], FRAME[0]]
    return lambda: generator._process_batch(points, FRAME, crop, FRAME)


def different_pixels(found: Any, wanted: Any) -> int:
    """The number of pixels of all masks that differ. Raises `AssertionError` if rounding at the threshold cannot explain it."""
    different, pixels = 0, FRAME[0] * FRAME[1]
    assert len(found["rles"]) == len(wanted["rles"])
    for pair in zip(found["rles"], wanted["rles"], strict=True):
        ours, theirs = (np.repeat(np.arange(len(rle["counts"])) % 2, rle["counts"]) for rle in pair)
        different += int((ours != theirs).sum())
    assert different <= MOST_DIFFERENT * pixels * len(found["rles"]), f"{different} pixels differ"
    return different


def thread_seconds(call: Callable[[], Any]) -> float:
    """Seconds that the calling thread computes in a call."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


def main() -> None:
    """Compares, measures and writes a row for each way."""
    torch.set_num_threads(1)
    parser = make_parser(__file__, __doc__)
    parser.add_argument("--points", type=int, default=64, help="of a batch")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    logits = smooth_logits(arguments.points)
    ways = {
        "segment-anything": batch_of(logits, optimized=False),
        "segment-anything, optimize()": batch_of(logits, optimized=True),
    }
    with torch.inference_mode():
        wanted, found = (way() for way in ways.values())
        facts = {"points": arguments.points, "masks": len(wanted["rles"]), "frame": FRAME}
        facts |= {"different_pixels": different_pixels(found, wanted)}
        del wanted, found
        memory = {name: peak_memory(way, "cpu") for name, way in ways.items()}
        times = take_turns(ways, arguments.rounds, thread_seconds)
    rows = [
        {"provider": name, **facts, **asdict(times[name]), "peak_memory_bytes": memory[name]}
        for name in ways
    ]
    write_rows(arguments.out, (row | {"provenance": arguments.origin} for row in rows))


if __name__ == "__main__":
    main()
