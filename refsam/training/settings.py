"""What a training run is configured by: the YAML files in `configs/`."""

from typing import Any, Literal

from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

_CLOSED = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_CLOSED)
class StageSettings:
    """A stretch of training on batches of one make.

    `clips` per batch, `frames` per clip, `expressions` per clip (0: only the image encoder is trained, by `loss.objects`);
    `image_size` that the frames are drawn and seen at, in pixels (None: the model's); `style` of the generated scenes;
    `loss_scale` shrinks the size at which the mask loss is taken.
    """

    steps: PositiveInt
    clips: PositiveInt
    frames: PositiveInt = 1
    expressions: NonNegativeInt = 6
    image_size: PositiveInt | None = None
    style: Literal["full", "larger", "few and large"] = "full"
    loss_scale: Literal[1, 2] = 1


@dataclass(frozen=True, config=_CLOSED)
class OptimiserSettings:
    """AdamW, linear warm-up and cosine decay to `final_rate` of the learning rate.

    With `muon` the weights of linear layers are stepped by Muon at the same rate instead: a model that starts from nothing
    learns in fewer steps.
    """

    muon: bool = False
    learning_rate: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.05
    warm_up_steps: NonNegativeInt = 300
    final_rate: NonNegativeFloat = 0.01
    clip_norm: PositiveFloat = 1.0
    average: PositiveFloat = (
        0.999  # decay of the running average of the weights that is saved as the model
    )


@dataclass(frozen=True, config=_CLOSED)
class LossSettings:
    """Weights of the losses of `refsam.training.losses`; `objects`, that of all `ObjectHead` reads, needs generated clips."""

    focal: NonNegativeFloat = 1.0
    dice: NonNegativeFloat = 1.0
    iou: NonNegativeFloat = 0.0
    objects: NonNegativeFloat = 0.0


@dataclass(frozen=True, config=_CLOSED)
class TrainingSettings:
    """One run: model, data, optimiser, and where it writes.

    `model` is `{preset: NAME}` or a whole RefSAMConfig; `start` a checkpoint to begin from; `output` the folder of the log,
    the resumable state and the final model; `workers` processes draw the batches ahead (0: the training's own).
    """

    model: dict[str, Any]
    stages: tuple[StageSettings, ...]
    output: str
    start: str | None = None
    seed: int = 0
    optimiser: OptimiserSettings = Field(default_factory=OptimiserSettings)
    loss: LossSettings = Field(default_factory=LossSettings)
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    threads: NonNegativeInt = 0
    workers: NonNegativeInt = 0
    save_every: PositiveInt = 200
    log_every: PositiveInt = 20
