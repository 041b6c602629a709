"""What a training run is configured by: the YAML files in `configs/`."""

from typing import Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from pydantic.dataclasses import dataclass

from refsam.data.augmentation import Augmentation

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
    learns in fewer steps. `rates` gives parts of the model, such as mask_decoder, a learning rate of their own, with the same
    course.
    """

    muon: bool = False
    learning_rate: PositiveFloat = 1e-3
    rates: dict[str, PositiveFloat] = Field(default_factory=dict)
    weight_decay: NonNegativeFloat = 0.05
    warm_up_steps: NonNegativeInt = 300
    final_rate: NonNegativeFloat = 0.01
    clip_norm: PositiveFloat = 1.0
    average: PositiveFloat = (
        0.999  # decay of the running average of the weights that is saved as the model
    )


@dataclass(frozen=True, config=_CLOSED)
class LossSettings:
    """Weights of the losses of `refsam.training.losses`; `objects` and `target`, of what `ObjectHead` reads from image
    and decoder, need generated clips."""

    focal: NonNegativeFloat = 1.0
    dice: NonNegativeFloat = 1.0
    iou: NonNegativeFloat = 0.0
    objects: NonNegativeFloat = 0.0
    target: NonNegativeFloat = 0.0


@dataclass(frozen=True, config=_CLOSED)
class DatasetSettings:
    """A dataset as `refsam.data.open_dataset` takes it, and how often an epoch goes through it.

    `split_by` and `exclude_shared` are for the RefCOCO family.
    """

    name: str
    root: str
    split: str = "train"
    weight: PositiveFloat = 1.0
    split_by: str | None = None
    exclude_shared: bool | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What `open_dataset` takes beside name, root and split."""
        options = {"split_by": self.split_by, "exclude_shared": self.exclude_shared}
        return {name: value for name, value in options.items() if value is not None}


@dataclass(frozen=True, config=_CLOSED)
class DataSettings:
    """What is trained on: generated clips, unless `datasets` are listed.

    `unreadable`: whether an image or mask that cannot be decoded stops the run, or its sample is skipped and the log counts it.
    """

    datasets: tuple[DatasetSettings, ...] = ()
    augmentation: Augmentation = Field(default_factory=Augmentation)
    unreadable: Literal["stop", "skip"] = "stop"


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
    data: DataSettings = Field(default_factory=DataSettings)
    seed: int = 0
    optimiser: OptimiserSettings = Field(default_factory=OptimiserSettings)
    loss: LossSettings = Field(default_factory=LossSettings)
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    threads: NonNegativeInt = 0
    workers: NonNegativeInt = 0
    save_every: PositiveInt = 200
    log_every: PositiveInt = 20

    @model_validator(mode="after")
    def _check(self) -> "TrainingSettings":
        if self.data.datasets and self.loss.objects:
            raise ValueError("loss.objects: datasets do not tell what it needs, want 0")
        if self.data.datasets and not all(stage.expressions for stage in self.stages):
            raise ValueError("stages: expressions is 0 somewhere, which datasets do not allow")
        return self
