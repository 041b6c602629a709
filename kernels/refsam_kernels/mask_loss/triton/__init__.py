"""`mask_loss` in Triton: its launches; see `kernels`."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from refsam_kernels.core.reasons import short
from refsam_kernels.core.triton_aot import CompileCase, Launch
from refsam_kernels.mask_loss.inputs import Inputs, Outputs
from refsam_kernels.mask_loss.triton.kernels import _gradient_kernel, _losses_kernel, _sums_kernel
from refsam_kernels.mask_postprocess.taps import Places, places_of
from refsam_kernels.mask_postprocess.triton import resize_arguments, resize_reasons

BLOCK_ROWS, BLOCK_COLUMNS = 8, 128  # of the target, forward
LOW_ROWS, LOW_COLUMNS = 16, 16  # of the logits, in the backward
PART_ROWS, PART_COLUMNS = 32, 32  # of the target that it reads at a time
BLOCK_TILES = 256
SUMS = 5  # of a tile


def not_supported_reasons(inputs: Inputs) -> list[str]:
    """Why the kernels cannot compute these."""
    height, width = inputs.input_size
    sizes = ([(height, width)], [(inputs.targets.shape[1], inputs.targets.shape[2])])
    return resize_reasons(inputs.logits, inputs.image_size, *sizes)


def forward(inputs: Inputs) -> Outputs:
    """Like `reference.forward`."""
    logits, masks = inputs.logits, len(inputs.logits)
    outputs = Outputs(*(logits.new_empty(*shape) for shape in ((masks,), (masks,), (4, masks))))
    for launch in _forward_launches(inputs, outputs, _places(inputs)):
        launch.run()
    return outputs


def backward(
    inputs: Inputs, outputs: Outputs, grads: Sequence[Tensor], needs: Sequence[bool]
) -> list[Tensor]:
    """Like `reference.backward`."""
    grad = inputs.logits.new_empty(inputs.logits.shape)
    grad_focal, grad_dice, sums = map(Tensor.contiguous, (*grads, outputs.sums))
    tensors = {"grad_focal": grad_focal, "grad_dice": grad_dice, "sums": sums, "grad": grad}
    _gradient_launch(inputs, tensors, _places(inputs)).run()
    return [grad]


def _places(inputs: Inputs) -> Places:
    logits, targets = inputs.logits, inputs.targets
    height, width = inputs.input_size
    sizes = (((height, width),), ((targets.shape[1], targets.shape[2]),))
    return places_of(tuple(logits.shape[1:]), inputs.image_size, *sizes, logits.device)


def _arguments(inputs: Inputs, places: Places) -> dict[str, Any]:
    """The arguments that the kernels of forward and backward share."""
    logits, targets, ignore, *_ = inputs
    targets = targets.contiguous()
    targets = targets.view(torch.uint8) if targets.dtype == torch.bool else targets
    return resize_arguments(logits.contiguous(), places) | {
        "targets": targets,
        "ignore": targets if ignore is None else ignore.contiguous().view(torch.uint8),
        "HAS_IGNORE": ignore is not None,
        "height": targets.shape[1],
        "width": targets.shape[2],
        "alpha": inputs.alpha,
        "GAMMA": inputs.gamma,
    }


def _forward_launches(inputs: Inputs, outputs: Outputs, places: Places) -> Iterator[Launch]:
    masks, height, width = inputs.targets.shape
    tiles = triton.cdiv(height, BLOCK_ROWS) * triton.cdiv(width, BLOCK_COLUMNS)
    partial = inputs.logits.new_empty(masks, tiles, SUMS)
    arguments = _arguments(inputs, places)
    arguments |= {"partial": partial, "BLOCK_Y": BLOCK_ROWS, "BLOCK_X": BLOCK_COLUMNS}
    yield Launch(_sums_kernel, (tiles, masks), arguments)
    arguments = outputs._asdict() | {"partial": partial, "masks": masks}
    arguments |= {"tiles": tiles, "BLOCK": BLOCK_TILES}
    yield Launch(_losses_kernel, (masks,), arguments)


def _gradient_launch(inputs: Inputs, tensors: dict[str, Tensor], places: Places) -> Launch:
    masks, low_height, low_width = inputs.logits.shape
    programs = triton.cdiv(low_height, LOW_ROWS) * triton.cdiv(low_width, LOW_COLUMNS)
    arguments = _arguments(inputs, places) | tensors | {"masks": masks}
    for name, taps in (("row", places.rows), ("column", places.columns)):
        arguments |= {f"{name}_first": taps.first, f"{name}_behind": taps.behind}
    arguments |= {"LOW_Y": LOW_ROWS, "LOW_X": LOW_COLUMNS}
    arguments |= {"PART_Y": PART_ROWS, "PART_X": PART_COLUMNS}
    # With four warps the products' operands do not fit the registers.
    return Launch(_gradient_kernel, (programs, masks), arguments, num_warps=8, num_stages=1)


def compile_cases() -> list[CompileCase]:
    """SAM's sizes with every kind of target, with and without pixels to ignore."""
    logits = torch.empty(8, 256, 256, device="meta")
    cases = []
    for dtype in (torch.bool, torch.float32, torch.bfloat16):
        targets = torch.empty(8, 480, 854, dtype=dtype, device="meta")
        ignore = None if dtype == torch.bool else torch.empty_like(targets, dtype=torch.bool)
        inputs = Inputs(logits, targets, ignore, 1024, (576, 1024), 0.25, 2.0)
        places = _places(inputs)
        name = f"{short(dtype)} targets{'' if ignore is None else ', ignore'}"
        losses = Outputs(logits.new_empty(8), logits.new_empty(8), logits.new_empty(4, 8))
        sums, totals = _forward_launches(inputs, losses, places)
        tensors = {"grad_focal": losses.focal, "grad_dice": losses.dice, "sums": losses.sums}
        gradient = _gradient_launch(inputs, tensors | {"grad": logits}, places)
        cases += [sums.compile_case(f"sums, {name}"), gradient.compile_case(f"gradient, {name}")]
    return [*cases, totals.compile_case("losses")]
