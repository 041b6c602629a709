"""Low-resolution logits to masks of the frame's size, bits and run lengths, against the calls that users write."""

from collections.abc import Callable, Mapping
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
Sizes = Mapping[str, Any]  # image_size, input_size and output_size, as the operators take them


def of_sam(output_size: Size) -> Sizes:
    """Sizes of a 16:9 frame in SAM's image, beside padding."""
    return {"image_size": IMAGE_SIZE, "input_size": INPUT_SIZE, "output_size": output_size}


def of_sam2(output_size: Size) -> Sizes:
    """SAM 2 resizes logits once: they are an image without padding."""
    return {"image_size": LOW, "input_size": (LOW, LOW), "output_size": output_size}


def interpolate(
    logits: Tensor, output_size: Size, image_size: int = IMAGE_SIZE, input_size: Size = INPUT_SIZE
) -> Tensor:
    """`Sam.postprocess_masks`, or SAM 2's: the logits of all masks at full size."""
    (height, width), image = input_size, logits[:, None]
    if image_size != logits.shape[-1]:
        image = F.interpolate(image, (image_size, image_size), mode="bilinear")
    return F.interpolate(image[..., :height, :width], output_size, mode="bilinear")[:, 0]


def interpolate_batch(logits: Tensor, sizes: Sizes) -> Tensor:
    """All masks at once, and the threshold."""
    return interpolate(logits, **sizes) > 0


def interpolate_loop(logits: Tensor, sizes: Sizes) -> Tensor:
    """The same mask by mask."""
    return torch.cat([interpolate_batch(mask[None], sizes) for mask in logits])


def bits_as_masks(logits: Tensor, sizes: Sizes, backend: str) -> Callable[[], Tensor]:
    """The bits, and a way to look at them that is not timed."""
    packed = mask_postprocess_bits(logits, **sizes, backend=backend)
    return lambda: torch.stack(packed.masks())


def run_lengths(logits: Tensor, sizes: Sizes, backend: str) -> list[Any]:
    """COCO's run lengths."""
    return mask_postprocess_rle(logits, **sizes, backend=backend)[0]


def coco_loop(logits: Tensor, sizes: Sizes) -> list[Any]:
    """The masks on the CPU, encoded by pycocotools."""
    from pycocotools import mask as coco

    masks = interpolate_loop(logits, sizes).mT.contiguous().cpu().numpy().view("uint8")
    return [coco.encode(mask.T) for mask in masks]


def smooth_logits(masks: int, device: str, side: int = LOW) -> Tensor:
    """Random smooth logits, as a decoder gives them."""
    generator = torch.Generator(device).manual_seed(42)
    coarse = torch.randn(masks, 1, 16, 16, generator=generator, device=device)
    return 8 * F.interpolate(coarse, (side, side), mode="bicubic")[:, 0]


def workload(device: str, *, masks: int, sizes: Sizes, form: str) -> Workload:
    """`form` of the result: bytes, bits or runs."""
    logits = smooth_logits(masks, device)
    functions: dict[str, Callable[..., Any]] = {
        "bytes": partial(mask_postprocess, logits, **sizes),
        "bits": partial(bits_as_masks, logits, sizes),
        "runs": partial(run_lengths, logits, sizes),
    }
    backends = {
        name: partial(functions[form], backend=name)
        for name in backends_of("mask_postprocess", device, with_reference=form == "bytes")
    }
    batch, loop = (partial(f, logits, sizes) for f in (interpolate_batch, interpolate_loop))
    plain: dict[str, Callable[[], Any]] = {"interpolate batch": batch, "interpolate loop": loop}
    if form == "runs":
        plain = {"interpolate, pycocotools": partial(coco_loop, logits, sizes)}
    full = interpolate(logits, **sizes)
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
            "image_size": sizes["image_size"],
            "output_size": sizes["output_size"],
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


for name, masks, sizes, form in (
    ("1 mask to 480p", 1, of_sam((480, 854)), "bytes"),
    ("8 masks to 1080p", 8, of_sam((1080, 1920)), "bytes"),
    ("8 masks to 1080p, bits", 8, of_sam((1080, 1920)), "bits"),
    ("8 masks to 1080p, run lengths", 8, of_sam((1080, 1920)), "runs"),
    ("16 masks of SAM 2 to 1080p, bits", 16, of_sam2((1080, 1920)), "bits"),
    ("16 masks of SAM 2 to 1080p, run lengths", 16, of_sam2((1080, 1920)), "runs"),
):
    make = partial(workload, masks=masks, sizes=sizes, form=form)
    baseline = "interpolate, pycocotools" if form == "runs" else "interpolate batch"
    register("mask_postprocess", name, baseline=baseline)(make)
