"""SAM's image encoder: segment-anything's, eager and compiled, transformers' with SDPA, timm's, OpenVINO's, ONNX Runtime's, ours.

All have the same weights; adapters are untrained. Products skip the padding of windows in the operations that are counted.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from benchmarks.end_to_end import int8
from benchmarks.end_to_end.encoder import (
    BASELINE,
    DTYPES,
    TOLERANCE,
    largest_error,
    providers,
    random_sam,
    usable_calls,
)
from benchmarks.end_to_end.peers import FLOAT_MODEL, INT8_MODEL, OPENVINO, prepare
from benchmarks.registry import DEVICES, Workload, register
from refsam import RefSAMConfig

OPERATOR = "image_encoder"


def encoder_flops(config: RefSAMConfig) -> int:
    """Operations of one image without adapters: a product and a sum are two."""
    sizes = config.image_encoder
    side, width = sizes.image_size // sizes.patch_size, sizes.embed_dim
    tokens, out = side**2, config.prompt_dim
    flops = 2 * tokens * (3 * sizes.patch_size**2 * width + width * out + 9 * out**2)
    matrices = 4 + 2 * sizes.mlp_ratio  # qkv, projection, and the MLP's two, in width^2
    for index in range(sizes.depth):
        window = side if index in sizes.global_blocks else sizes.window_size
        rows = [min(window, side - start) for start in range(0, side, window)]
        pairs = sum(row**2 for row in rows) ** 2
        flops += int(2 * matrices * tokens * width**2)
        flops += 4 * pairs * width + 4 * tokens * window * width
    return flops


def workload(device: str, *, preset: str, image_size: int, dtype: str) -> Workload:
    """One image; in bfloat16 results may be off by twice the error of segment-anything's own encoder."""
    config = RefSAMConfig.preset(preset).override(f"image_encoder.image_size={image_size}")
    return compare_encoders(device, config, dtype)


@torch.inference_mode()
def compare_encoders(device: str, config: RefSAMConfig, dtype: str) -> Workload:
    """All ways to encode one image with a configuration's encoder."""
    sam, size = random_sam(config).to(device), config.image_encoder.image_size
    pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    calls, skipped = usable_calls(list(providers(dtype, device)), config, sam, pixels)
    exact = sam(pixels)
    limit = TOLERANCE
    if dtype != "float32":
        limit = 2 * largest_error(calls[BASELINE](), exact)
    weights = sum(parameter.numel() for parameter in sam.parameters())
    return Workload(
        providers=calls,
        wrong=partial(too_far, exact=exact, limit=limit),
        moved_bytes=weights * DTYPES[dtype].itemsize + pixels.nbytes + exact.nbytes,
        flops=encoder_flops(config),
        shapes={"pixels": list(pixels.shape), "dtype": dtype},
        dtype=DTYPES[dtype],
        skipped=skipped,
    )


# OpenVINO's mean error with random weights is 3 %.
MOST_OF_INT8 = 0.05


@torch.inference_mode()
def int8_workload(device: str, *, preset: str, image_size: int) -> Workload:
    """One image in 8-bit integers, ours and OpenVINO's by NNCF, against segment-anything in float32."""
    config = RefSAMConfig.preset(preset).override(f"image_encoder.image_size={image_size}")
    sam, pixels = random_sam(config), int8.image(config)
    exact = sam(pixels)
    folder = TemporaryDirectory()
    left_out = list(prepare(sam, pixels, Path(folder.name), (FLOAT_MODEL, INT8_MODEL)))
    ways = [int8.Provider(name, "int8") for name in (int8.OURS, OPENVINO)]
    calls: dict[str, Callable[[], Tensor]] = {BASELINE: inference(partial(sam, pixels))}
    skipped = {}
    for way in ways:
        if way.name == OPENVINO and left_out:
            skipped[way.label] = left_out[0]
            continue
        calls[way.label] = inference(
            partial(int8.make(way, config, sam, Path(folder.name)), pixels)
        )
    weights = sum(parameter.numel() for parameter in sam.parameters())
    return Workload(
        providers=calls,
        wrong=partial(off_on_average, exact=exact),
        moved_bytes=weights + pixels.nbytes + exact.nbytes,
        flops=encoder_flops(config),
        shapes={"pixels": list(pixels.shape), "dtype": "int8"},
        skipped=skipped,
    )


def inference(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call in inference mode, whoever calls it."""

    @torch.inference_mode()
    def run() -> Tensor:
        return call()

    return run


def off_on_average(found: Tensor, *, exact: Tensor) -> str | None:
    """In words by how much a result is off on average, relative to the mean size."""
    error = int8.error_of(found, exact)
    return (
        None if error <= MOST_OF_INT8 else f"error {error:.1e}, at most {MOST_OF_INT8} is allowed"
    )


def too_far(found: Tensor, *, exact: Tensor, limit: float) -> str | None:
    """In words how far a result is off, relative to the largest value."""
    error = largest_error(found, exact)
    return None if error <= limit else f"error {error:.1e}, at most {limit:.1e} is allowed"


for name, preset, image_size, dtype, devices in (
    ("ViT-B", "vit_b", 512, "float32", DEVICES),
    ("ViT-B", "vit_b", 512, "bfloat16", DEVICES),
    ("ViT-B", "vit_b", 1024, "float32", DEVICES),
    ("ViT-B", "vit_b", 1024, "bfloat16", DEVICES),
    ("ViT-L", "vit_l", 1024, "bfloat16", ("cuda",)),
    ("ViT-H", "vit_h", 1024, "bfloat16", ("cuda",)),
):
    case = partial(workload, preset=preset, image_size=image_size, dtype=dtype)
    label = f"{name}, {image_size} pixels, {dtype}"
    register(OPERATOR, label, baseline=BASELINE, devices=devices)(case)

for image_size in (512, 1024):
    case = partial(int8_workload, preset="vit_b", image_size=image_size)
    register(OPERATOR, f"ViT-B, {image_size} pixels, int8", baseline=BASELINE, devices=("cpu",))(
        case
    )
