"""The image encoder in bfloat16, one image and eight, by graph replay: our backends, and other libraries."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.end_to_end.encoder import BASELINE, SDPA, Provider, largest_error, make, random_sam
from benchmarks.gpu_report.machine import (
    DEVICE,
    IS_REHEARSAL,
    attempt,
    timed_and_weighed,
)
from benchmarks.gpu_report.rows import Rows
from benchmarks.measure import exact_products
from benchmarks.ops.image_encoder import encoder_flops
from benchmarks.registry import backends_of
from refsam.config import RefSAMConfig

BATCHES = (1, 2) if IS_REHEARSAL else (1, 8)
# In bfloat16 a result may be off by twice what segment-anything's own is; relative to the largest value.
FACTOR = 2
TINY = (
    "image_encoder.image_size=64",
    "image_encoder.embed_dim=32",
    "image_encoder.num_heads=1",
    "image_encoder.depth=2",
    "image_encoder.window_size=3",
    "image_encoder.global_blocks=[0,1]",
)


@torch.inference_mode()
def run(rows: Rows, model: str) -> None:
    """A row for each batch and provider."""
    exact_products()
    config = RefSAMConfig.preset(model)
    if IS_REHEARSAL:
        config = config.override(*TINY)
    with torch.device(DEVICE):  # the weights are drawn where they are used
        sam = random_sam(config)
    size = config.image_encoder.image_size
    pixels = torch.randn(max(BATCHES), 3, size, size, device=DEVICE)
    exact = sam(pixels[:1])
    plain = make(Provider(BASELINE, "bfloat16"), config, sam)(pixels[:1])
    limit = FACTOR * largest_error(plain, exact)
    flops = encoder_flops(config)
    for batch in BATCHES:
        for name, build in providers(config, sam, with_others=batch == BATCHES[0]):
            facts = {"model": model, "batch": batch, "provider": name}
            measure = partial(measure_one, build, pixels[:batch], exact, limit, flops)
            attempt(rows, measure, **facts)


def providers(
    config: RefSAMConfig, sam: nn.Module, *, with_others: bool
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Our encoder with each backend of its attention, with the automatic order, with adapters; then other libraries' encoders."""
    for name in ("", *backends_of("rel_pos_attention", DEVICE)):
        # Triton's interpreter, in a rehearsal, knows no bfloat16.
        dtype = "float32" if IS_REHEARSAL and name in ("", "triton") else "bfloat16"
        ours = Provider(f"refsam, {name or 'automatic'}", dtype, name, packed=True)
        yield ours.name, partial(make, ours, config, sam)
    backend = "fallback" if IS_REHEARSAL else ""
    adapted = Provider("refsam, adapters", "bfloat16", backend, packed=True, adapters=True)
    yield adapted.name, partial(make, adapted, config, sam)
    for other in (BASELINE, SDPA) if with_others else ():
        yield other, partial(make, Provider(other, "bfloat16"), config, sam)


def measure_one(
    build: Callable[[], Callable[[Tensor], Tensor]],
    pixels: Tensor,
    exact: Tensor,
    limit: float,
    flops: int,
) -> dict[str, Any]:
    """Checks the first image, then times the batch; `wrong` says what is wrong."""
    with torch.device(DEVICE):
        encode = build()
    error = largest_error(encode(pixels[:1]), exact)
    if not error <= limit and not IS_REHEARSAL:
        return {"wrong": f"error {error:.1e}, at most {limit:.1e} is allowed"}
    found = timed_and_weighed(partial(encode, pixels), 0.5, flops * len(pixels))
    return {"error": error, **found, "ms_an_image": 1e-9 * flops / found["TFLOP/s"]}
