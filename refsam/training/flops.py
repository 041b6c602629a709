"""Operations of a training step: the matrix products of forward and backward, counted while they run.

torch counts its own operators; those of refsam_kernels are one node each, so their products are told here. What recomputation
adds is not counted: the number says what the model needs, not what a way to compute it does.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from refsam.model import RefSAM
from refsam.training.batches import TrainingBatch
from refsam.training.distributed import Processes
from refsam.training.module import NotANumberError, TrainingModule
from refsam.training.monitoring import measure_peak_flops
from refsam.training.settings import StageSettings, TrainingSettings

Shape = Sequence[int]


class StepFlops:
    """What the batches of a run take, counted once for each stage, and only where the devices' peak is known.

    `peak` is what all devices together reach, operations per second.
    """

    def __init__(
        self, settings: TrainingSettings, module: TrainingModule, processes: Processes
    ) -> None:
        self.module = module
        self.peak: float | None = None
        self._counted: tuple[StageSettings, int] | None = None
        if settings.peak_tflops == "measure":
            dtype = getattr(torch, settings.dtype)
            self.peak = measure_peak_flops(processes.device, dtype) * processes.count
        elif settings.peak_tflops is not None:
            self.peak = 1e12 * settings.peak_tflops * processes.count

    def of(
        self, shared: Callable[..., dict[str, Tensor]], batch: TrainingBatch, stage: StageSettings
    ) -> int:
        """Operations of one batch of a stage on one device, 0 where they are not wanted."""
        if self.peak is None:
            return 0
        if self._counted is None or self._counted[0] is not stage:
            try:
                flops = count_flops(shared, self.module.model, batch, stage)
            except NotANumberError:  # the step itself will find it
                return 0
            self.module.head.zero_grad(set_to_none=True)
            self._counted = (stage, flops)
        return self._counted[1]


def count_flops(
    module: Callable[..., dict[str, Tensor]],
    model: RefSAM,
    batch: TrainingBatch,
    stage: StageSettings,
) -> int:
    """Operations, two for each multiplication with addition, of the losses of a batch and their gradients, which are dropped.

    They are counted on the first frame of the first clip and multiplied: all but a few thousandths grow with both.
    """
    encoder = model.image_encoder
    checkpointing, encoder.activation_checkpointing = encoder.activation_checkpointing, False
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    try:
        with counter:
            module(first_frame(batch), replace(stage, clips=1, frames=1))["total"].backward()
    finally:
        model.zero_grad(set_to_none=True)
        encoder.activation_checkpointing = checkpointing
    return counter.get_total_flops() * stage.clips * stage.frames


def first_frame(batch: TrainingBatch) -> TrainingBatch:
    """The first frame of the first clip as a batch."""
    clips = batch.clips
    return TrainingBatch(
        replace(
            clips,
            frames=clips.frames[:1, :1],
            masks=clips.masks[:1, :, :1],
            sizes=clips.sizes[:1],
            texts=clips.texts[:1],
            colour=None if clips.colour is None else clips.colour[:1],
            names=clips.names[:1],
        ),
        None if batch.attributes is None else batch.attributes[:1, :1],
        None if batch.owner is None else batch.owner[:1, :1],
    )


# A product's operations and, where its second factor is a weight, which of the operator's differentiable arguments that is.
Product = tuple[int, int | None]


def _formulas() -> dict[Any, Callable[..., int]]:
    """How to count each operator of refsam_kernels that multiplies matrices, forward and backward."""
    formulas: dict[Any, Callable[..., int]] = {}
    for name, (products, gradients) in _OPERATORS.items():
        forward = getattr(torch.ops.refsam_kernels, name)
        backward = getattr(torch.ops.refsam_kernels, f"{name}_backward")
        formulas[forward] = partial(_forward_flops, products)
        formulas[backward] = partial(_backward_flops, products, gradients)
    return formulas


def _forward_flops(
    products: Callable[..., list[Product]], *arguments: Any, out_shape: Any = None
) -> int:
    return sum(count for count, _ in products(*arguments))


def _backward_flops(
    products: Callable[..., list[Product]], gradients: int, *arguments: Any, out_shape: Any = None
) -> int:
    """As many again for the first factor's gradient, and for the second's where it is wanted."""
    needs = arguments[-2]
    return sum(
        count * (2 if weight is None or needs[weight] else 1)
        for count, weight in products(*arguments[gradients:])
    )


def _linear(rows: int, arguments: Sequence[Any], *weights: int) -> list[Product]:
    """Rows through the linear layers whose weights are these arguments, where they are there."""
    present = [index for index in weights if arguments[index] is not None]
    return [(2 * rows * prod(arguments[index]), index) for index in present]


def _rel_pos_attention(*arguments: Any) -> list[Product]:
    """Queries with keys, weights with values, queries with both position tables; padding's keys count."""
    B, h, w, width = arguments[0]
    window = next(a for a in reversed(arguments[:-2]) if type(a) is int)
    rows, columns = (window, window) if window else (h, w)
    queries = B * (ceil(h / rows) * rows) * (ceil(w / columns) * columns)
    per_key = 2 * queries * (width // 3)
    return [
        (2 * per_key * rows * columns, None),
        (per_key * rows, 1),
        (per_key * columns, 2),
    ]


def _adapter_projection(*arguments: Any) -> list[Product]:
    return _linear(prod(arguments[0][:-1]), arguments, 2, 4, 6)


def _adapter_mlp(*arguments: Any) -> list[Product]:
    return _linear(prod(arguments[0][:-1]), arguments, 2, 4, 6, 8)


def _dense_attention(features: Shape, text: Shape, *_: Any) -> list[Product]:
    """The features' half of the projection once per frame; words with features, and their mixtures, per expression."""
    levels, frames, tokens, channels = features
    expressions, words, _channels = text
    projection = 2 * levels * frames * tokens * channels * channels
    return [(projection, 2), (2 * 2 * levels * expressions * tokens * words * channels, None)]


def _token_image_attention(*arguments: Any) -> list[Product]:
    (masks, asking, _), asked, inner = arguments[0], arguments[1][1], arguments[4][0]
    return [
        *_linear(masks * asking, arguments, 4, 10),
        *_linear(masks * asked, arguments, 6, 8),
        (2 * 2 * masks * asking * asked * inner, None),
    ]


def _mask_upscale(*arguments: Any) -> list[Product]:
    (masks, h, w, _), (_, count, channels) = arguments[0], arguments[1]
    return [
        *_linear(masks * h * w, arguments, 2),
        *_linear(masks * 4 * h * w, arguments, 6),
        (2 * masks * count * channels * 16 * h * w, None),
    ]


# By operator: its products, and how many gradients its backward is given before the forward's arguments.
_OPERATORS: dict[str, tuple[Callable[..., list[Product]], int]] = {
    "rel_pos_attention": (_rel_pos_attention, 1),
    "adapter_projection": (_adapter_projection, 2),
    "adapter_mlp": (_adapter_mlp, 2),
    "dense_attention": (_dense_attention, 1),
    "token_image_attention": (_token_image_attention, 1),
    "mask_upscale": (_mask_upscale, 1),
}
