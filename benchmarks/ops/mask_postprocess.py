"""Low-resolution logits to masks of the frame's size, against the loop over masks that users write."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import Workload, backends_of, register
from refsam_kernels import mask_postprocess

IMAGE_SIZE = 1024
INPUT_SIZE = (576, 1024)  # a 16:9 frame without its padding
LOW = 256


def interpolate_loop(logits: Tensor, output_size: tuple[int, int]) -> Tensor:
    """`Sam.postprocess_masks` and the threshold, mask by mask."""
    height, width = INPUT_SIZE
    masks = []
    for mask in logits:
        image = F.interpolate(mask[None, None], (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear")
        output = F.interpolate(image[..., :height, :width], output_size, mode="bilinear")
        masks.append(output[0, 0] > 0)
    return torch.stack(masks)


def workload(device: str, *, masks: int, output_size: tuple[int, int]) -> Workload:
    """Random smooth logits, as a decoder gives them."""
    generator = torch.Generator().manual_seed(42)
    coarse = torch.randn(masks, 1, 16, 16, generator=generator)
    logits = (8 * F.interpolate(coarse, (LOW, LOW), mode="bicubic")[:, 0]).to(device)
    backends = {
        name: partial(
            mask_postprocess,
            logits,
            image_size=IMAGE_SIZE,
            input_size=INPUT_SIZE,
            output_size=output_size,
            backend=name,
        )
        for name in backends_of("mask_postprocess", device)
    }
    loop = partial(interpolate_loop, logits, output_size)
    pixels = masks * output_size[0] * output_size[1]
    return Workload(
        providers={"interpolate loop": loop, **backends},
        wrong=partial(undecided_only, expected=loop(), allowed=pixels // 100_000),
        moved_bytes=logits.nbytes + pixels,
        flops=pixels
        * 8,  # four products and sums per pixel, the columns being shared by neighbouring rows
        shapes={"logits": list(logits.shape), "image_size": IMAGE_SIZE, "output_size": output_size},
    )


def undecided_only(masks: Tensor, *, expected: Tensor, allowed: int) -> str | None:
    """Masks may differ where the logit is zero up to rounding: at most one pixel in 100 000 of a smooth map."""
    different = int((masks != expected).sum())
    return None if different <= allowed else f"{different} pixels differ, at most {allowed} may"


for name, masks, output_size in (
    ("1 mask to 480p", 1, (480, 854)),
    ("8 masks to 1080p", 8, (1080, 1920)),
):
    make = partial(workload, masks=masks, output_size=output_size)
    register("mask_postprocess", name, baseline="interpolate loop")(make)
