"""Operations of a training step: the matrix products of forward and backward, counted while they run.

Recomputation is not counted: the number says what the model needs, however it is computed.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from refsam.model import RefSAM
from refsam.training.batches import TrainingBatch
from refsam.training.distributed import Processes
from refsam.training.module import NotANumberError, TrainingModule
from refsam.training.monitoring import measure_peak_flops
from refsam.training.settings import StageSettings, TrainingSettings
from refsam_kernels import flop_formulas


class StepFlops:
    """Counts the operations of a run's batches, once per stage, if the devices' peak is known.

    `peak` is the sum over all devices, in operations per second.
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
        """Operations of one batch of a stage on one device; 0 if the peak is not known."""
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
    counter = FlopCounterMode(display=False, custom_mapping=flop_formulas())
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
