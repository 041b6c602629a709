"""Low-resolution logits to masks of the frame's size, bits and run lengths, against the calls that users write."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import Workload, backends_of, register
from refsam_kernels import mask_postprocess, mask_postprocess_bits, mask_postprocess_rle

IMAGE_SIZE = 1024
INPUT_SIZE = (576, 1024)  # a 16:9 frame without its padding
LOW = 256
# A mask may differ where the resized logit is this close to the threshold, relative to the largest.
UNDECIDED = 1e-5

Size = tuple[int, int]


def interpolate(
    logits: Tensor, output_size: Size, image_size: int = IMAGE_SIZE, input_size: Size = INPUT_SIZE
) -> Tensor:
    """`Sam.postprocess_masks`: the logits of all masks at full size."""
    height, width = input_size
    image = F.interpolate(logits[:, None], (image_size, image_size), mode="bilinear")
    return F.interpolate(image[..., :height, :width], output_size, mode="bilinear")[:, 0]


def interpolate_batch(logits: Tensor, output_size: Size) -> Tensor:
    """All masks in two calls, and the threshold."""
    return interpolate(logits, output_size) > 0


def interpolate_loop(logits: Tensor, output_size: Size) -> Tensor:
    """The same mask by mask."""
    return torch.cat([interpolate_batch(mask[None], output_size) for mask in logits])


def bits_as_masks(logits: Tensor, output_size: Size, backend: str) -> Callable[[], Tensor]:
    """The bits, and a way to look at them that is not timed."""
    sizes: dict[str, Any] = {"image_size": IMAGE_SIZE, "input_size": INPUT_SIZE}
    packed = mask_postprocess_bits(logits, **sizes, output_size=output_size, backend=backend)
    return lambda: torch.stack(packed.masks())


def run_lengths(logits: Tensor, output_size: Size, backend: str) -> list[Any]:
    """COCO's run lengths."""
    sizes: dict[str, Any] = {"image_size": IMAGE_SIZE, "input_size": INPUT_SIZE}
    return mask_postprocess_rle(logits, **sizes, output_size=output_size, backend=backend)[0]


def coco_loop(logits: Tensor, output_size: Size) -> list[Any]:
    """The masks on the CPU, encoded by pycocotools."""
    from pycocotools import mask as coco

    masks = interpolate_loop(logits, output_size).mT.contiguous().cpu().numpy().view("uint8")
    return [coco.encode(mask.T) for mask in masks]


def smooth_logits(masks: int, device: str) -> Tensor:
    """Random smooth logits, as a decoder gives them."""
    generator = torch.Generator(device).manual_seed(42)
    coarse = torch.randn(masks, 1, 16, 16, generator=generator, device=device)
    return 8 * F.interpolate(coarse, (LOW, LOW), mode="bicubic")[:, 0]


def workload(device: str, *, masks: int, output_size: Size, form: str) -> Workload:
    """`form` says what is asked for: bytes, bits or runs."""
    logits = smooth_logits(masks, device)
    functions: dict[str, Callable[..., Any]] = {
        "bytes": partial(
            mask_postprocess, logits, image_size=IMAGE_SIZE, input_size=INPUT_SIZE, output_size=output_size
        ),
        "bits": partial(bits_as_masks, logits, output_size),
        "runs": partial(run_lengths, logits, output_size),
    }  # fmt: skip
    backends = {
        name: partial(functions[form], backend=name)
        for name in backends_of("mask_postprocess", device, with_reference=form == "bytes")
    }
    batch, loop = (partial(f, logits, output_size) for f in (interpolate_batch, interpolate_loop))
    plain: dict[str, Callable[[], Any]] = {"interpolate batch": batch, "interpolate loop": loop}
    if form == "runs":
        plain = {"interpolate, pycocotools": partial(coco_loop, logits, output_size)}
    full = interpolate(logits, output_size)
    decided = full.abs() >= UNDECIDED * logits.abs().max()
    pixels = full.numel()
    flips = {
        name: int((as_masks(run(), device) != (full > 0)).sum()) for name, run in backends.items()
    }
    return Workload(
        providers=plain | backends,
        wrong=partial(undecided_only, expected=full > 0, decided=decided),
        moved_bytes=logits.nbytes + (pixels if form == "bytes" else pixels // 8),
        flops=8 * pixels,  # four products and sums each: columns are shared by neighbouring rows
        shapes={
            "logits": list(logits.shape),
            "image_size": IMAGE_SIZE,
            "output_size": output_size,
            "form": form,
            "flipped_pixels": flips,
        },
    )


def as_masks(result: Any, device: str) -> Tensor:
    """Masks (P, H, W) bool of any form."""
    if isinstance(result, Tensor):
        return result
    if callable(result):
        return result()
    from pycocotools import mask as coco

    return torch.from_numpy(coco.decode(result)).permute(2, 0, 1).bool().to(device)


def undecided_only(result: Any, *, expected: Tensor, decided: Tensor) -> str | None:
    """Masks may differ where the logit is at the threshold up to rounding, nowhere else."""
    masks = as_masks(result, str(expected.device))
    different = int(((masks != expected) & decided).sum())
    return f"{different} decided pixels differ, none may" if different else None


for name, masks, output_size, form in (
    ("1 mask to 480p", 1, (480, 854), "bytes"),
    ("8 masks to 1080p", 8, (1080, 1920), "bytes"),
    ("8 masks to 1080p, bits", 8, (1080, 1920), "bits"),
    ("8 masks to 1080p, run lengths", 8, (1080, 1920), "runs"),
):
    make = partial(workload, masks=masks, output_size=output_size, form=form)
    baseline = "interpolate, pycocotools" if form == "runs" else "interpolate batch"
    register("mask_postprocess", name, baseline=baseline)(make)
