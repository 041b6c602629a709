"""A training step on the GPU: time by events and peak memory, with and without activation checkpointing."""

import math
from argparse import Namespace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.end_to_end.training import CHECKPOINTED, OURS, Step, make_batch, make_module
from benchmarks.gpu_report.machine import (
    DEVICE,
    IS_REHEARSAL,
    attempt,
    median_ms,
)
from benchmarks.gpu_report.rows import Rows
from benchmarks.measure import exact_products, peak_memory


def run(rows: Rows, model: str) -> None:
    """A row for each way to keep activations, in bfloat16 and for ViT-B in float32."""
    exact_products()
    size, depth, frames = (64, 2, 1) if IS_REHEARSAL else (1024, None, 3)
    name = "nano" if IS_REHEARSAL else model
    options = Namespace(model=name, image_size=size, depth=depth, frames=frames)
    with torch.device(DEVICE):
        module = make_module(options).to(DEVICE)
    batch = make_batch(frames)
    dtypes = (torch.bfloat16,) if model == "vit_h" else (torch.bfloat16, torch.float32)
    for dtype in dtypes:
        for way in (OURS, CHECKPOINTED):
            facts = {"model": model, "dtype": str(dtype).removeprefix("torch."), "provider": way}
            attempt(rows, partial(measure, Step(way, module, batch), dtype), **facts)


def measure(step: Step, dtype: torch.dtype) -> dict[str, Any]:
    """One step's time and what it needs above the weights."""

    def call() -> Tensor:
        with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
            return step()

    loss = float(call())
    if math.isnan(loss):
        return {"wrong": f"the loss is {loss}"}
    memory = peak_memory(call, DEVICE)
    return {"loss": loss, **median_ms(call, 1.0, least=3, most=10), "peak_bytes": memory}
