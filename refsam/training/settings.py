"""The configuration of a training run, as the YAML files in `configs/` hold it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass

from refsam import renamed
from refsam.config import (
    PRESETS,
    EVFConfig,
    RefSAMConfig,
    apply_overrides,
    config_from_dict,
    config_to_dict,
    read_yaml,
)
from refsam.data import ReferringDataset, open_dataset
from refsam.data.augmentation import Augmentation
from refsam.errors import ConfigError

_CLOSED = ConfigDict(extra="forbid")
Beta = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, config=_CLOSED)
class StageSettings:
    """A stage of training, with one kind of batch.

    `steps`: number of steps, at most `epochs` passes over the datasets. `clips` per batch, `frames` and `expressions`
    per clip (0 expressions: only the image encoder is trained, by `loss.objects`). `image_size` of the frames in
    pixels (None: the model's). `style` of generated scenes. `photographs`: share of batches made of
    `data.photographs`; the others are generated. `loss_scale`: factor by which the mask loss is taken at a smaller
    size. `tbptt_frames`: number of frames through which gradients flow back along track tokens (None: the whole
    clip).
    """

    steps: PositiveInt
    clips: PositiveInt
    epochs: PositiveFloat | None = None
    frames: PositiveInt = 1
    expressions: NonNegativeInt = 6
    image_size: PositiveInt | None = None
    style: Literal["full", "larger", "many", "crowd", "blocks", "few and large"] = "full"
    photographs: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    loss_scale: Literal[1, 2] = 1
    tbptt_frames: PositiveInt | None = None


@dataclass(frozen=True, config=_CLOSED)
class OptimiserSettings:
    """AdamW, linear warm-up and cosine decay to `final_rate` of the learning rate.

    `muon`: optimise the weights of linear layers by Muon at the same rate; a model that starts from random weights
        needs fewer steps. `lr_overrides`: learning rates of parts of the model, such as mask_decoder or
        trunk.network, with the same schedule; the narrowest part wins. `max_grad_norm`: limit of the norm of all
        gradients together (None: it is only logged). `betas` of AdamW; `decay_norms`: apply weight decay to norms,
        biases, tokens and position tables, too. `lr_batch`: number of clips in a step that the learning rates are
        meant for; they are scaled linearly to the actual number, over all processes (None: no scaling).
        `gradient_accumulation_steps`: batches per step. `ema_decay` of the moving average of the weights, which is
        validated and saved as the model (None: the weights themselves are).
    """

    muon: bool = False
    learning_rate: PositiveFloat = 1e-3
    lr_overrides: dict[str, PositiveFloat] = Field(default_factory=dict)
    weight_decay: NonNegativeFloat = 0.05
    warm_up_steps: NonNegativeInt = 300
    final_rate: NonNegativeFloat = 0.01
    max_grad_norm: PositiveFloat | None = 1.0
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    decay_norms: bool = False
    lr_batch: PositiveInt | None = None
    gradient_accumulation_steps: PositiveInt = 1
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = 0.999


@dataclass(frozen=True, config=_CLOSED)
class LossSettings:
    """Weights of the losses of `refsam.training.losses`.

    `objects` and `target` weigh the predictions of `ObjectHead` from image and decoder; `objects` needs generated
    clips. `nouns` weighs the loss that ties nouns to the classes of a published trunk.
    """

    focal: NonNegativeFloat = 1.0
    dice: NonNegativeFloat = 1.0
    iou: NonNegativeFloat = 0.0
    objects: NonNegativeFloat = 0.0
    target: NonNegativeFloat = 0.0
    nouns: NonNegativeFloat = 0.0


@dataclass(frozen=True, config=_CLOSED)
class DatasetSettings:
    """A dataset, as `refsam.data.open_dataset` takes it; an epoch contains it `weight` times.

    `split_by` and `exclude_shared` are for the RefCOCO family.
    """

    name: str
    root: str
    split: str = "train"
    weight: PositiveFloat = 1.0
    split_by: str | None = None
    exclude_shared: bool | None = None

    def open(self) -> ReferringDataset:
        """The dataset; raises DataError."""
        options = {"split_by": self.split_by, "exclude_shared": self.exclude_shared}
        given = {name: value for name, value in options.items() if value is not None}
        return open_dataset(self.name, self.root, self.split, **given)


@dataclass(frozen=True, config=_CLOSED)
class PhotographSettings:
    """A folder of photographs with class masks, laid out as docs/data.md says.

    `composites`, `balance`, `only_cut_out` and `cached` as in `refsam.data.photographs.scenes.SceneDrawer`.
    """

    root: str
    split: str = "train"
    composites: Annotated[float, Field(ge=0.0, le=1.0)] = 0.4
    balance: Annotated[float, Field(ge=0.0, le=1.0)] = 0.6
    only_cut_out: tuple[str, ...] = ()
    cached: NonNegativeInt = 0


@dataclass(frozen=True, config=_CLOSED)
class DataSettings:
    """The training data: generated clips and `photographs`, as the stages mix them, unless `datasets` are listed.

    `unreadable`: stop the run at an image or mask that cannot be decoded, or skip its sample and count it in the log.
    """

    datasets: tuple[DatasetSettings, ...] = ()
    photographs: PhotographSettings | None = None
    augmentation: Augmentation = Field(default_factory=Augmentation)
    unreadable: Literal["stop", "skip"] = "stop"


@dataclass(frozen=True, config=_CLOSED)
class ValidationSettings:
    """The validation data; the model is scored every `every` steps and at the end (None: never).

    `clips`: number of videos of `dataset`, spread evenly over its list, or of generated clips that training never
        draws. `frames`: annotated frames of each, from the first (None: the whole video, online, as in use);
        `most_frames`: limit over all videos, which reduces their number. `examples`: clips with pictures. `keep`:
        number of models with the highest scores to keep below `top/`. `patience`: validations without a better score
        after which the run ends (None: never).
    """

    every: PositiveInt | None = None
    dataset: DatasetSettings | None = None
    clips: PositiveInt = 20
    frames: PositiveInt | None = 8
    most_frames: PositiveInt | None = None
    examples: NonNegativeInt = 4
    keep: PositiveInt = 1
    patience: PositiveInt | None = None


@dataclass(frozen=True, config=_CLOSED)
class TrainingSettings:
    """One run: model, data, optimiser, computation and output.

    `model`: a preset by name with entries to change, as in `{preset: vit_b, prompt_dim: 128}`, or a whole RefSAMConfig.
    `init_from`: a checkpoint to start from; entries of `model` override its configuration (a preset must have its size).
    `sam`: SAM's file or folder, if that checkpoint is a delta. `trunk`, `detector`: published weights that these parts of a
    new model start with (docs/training.md says where to get them). `output`: the folder for log, state and models.
    `workers`: processes that draw batches ahead (0: the training process draws them). `text_cache`: a folder that keeps a
    frozen text encoder's output for each expression.

    `activation_checkpointing` keeps only the input of each block of the image encoder and computes the rest again: less memory,
    more time. `compile` applies torch.compile to the image encoder. `parallel` is the strategy for several processes: `ddp`
    copies the model to each, `fsdp` shards weights, gradients and the optimiser's state. With `peak_tflops` of one device,
    given or measured, the log has its utilisation (MFU). `delta` saves a model that started from SAM's file without SAM's
    unchanged weights. `wandb` is a project of Weights & Biases that gets the log too.
    """

    stages: tuple[StageSettings, ...]
    output: str
    init_from: str | None = None
    model: dict[str, Any] = Field(default_factory=dict)
    trunk: str | None = None
    detector: str | None = None
    sam: str | None = None
    text_cache: str | None = None
    data: DataSettings = Field(default_factory=DataSettings)
    validation: ValidationSettings = Field(default_factory=ValidationSettings)
    seed: int = 0
    optimiser: OptimiserSettings = Field(default_factory=OptimiserSettings)
    loss: LossSettings = Field(default_factory=LossSettings)
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    threads: NonNegativeInt = 0
    workers: NonNegativeInt = 0
    activation_checkpointing: bool = False
    compile: bool = False
    parallel: Literal["ddp", "fsdp"] = "ddp"
    peak_tflops: PositiveFloat | Literal["measure"] | None = None
    delta: bool = True
    wandb: str | None = None
    save_every: PositiveInt = 200
    log_every: PositiveInt = 20

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Iterable[str] = ()) -> "TrainingSettings":
        """Read a YAML file and apply overrides such as `optimiser.learning_rate=3e-4`.

        Raises ConfigError with every bad entry.
        """
        values = renamed.settings(read_yaml(path))
        return config_from_dict(cls, apply_overrides(values, map(renamed.override, overrides)))

    @model_validator(mode="before")
    @classmethod
    def _accept_old_names(cls, values: Any) -> Any:
        return renamed.settings(values) if isinstance(values, dict) else values

    @field_validator("model")
    @classmethod
    def _check_model(cls, model: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if model and info.data.get("init_from") is None:  # else it overrides that configuration
            _architecture(model)
        return model

    @model_validator(mode="after")
    def _check(self) -> "TrainingSettings":
        problems = {
            "loss.objects: datasets lack its labels, want 0": (
                self.data.datasets and self.loss.objects
            ),
            "stages: expressions is 0 somewhere, which datasets do not allow": (
                self.data.datasets and not all(stage.expressions for stage in self.stages)
            ),
            "data.photographs: datasets are not mixed with them, want one of the two": (
                self.data.datasets and self.data.photographs
            ),
            "data.photographs: a stage takes photographs, want the folder's root": (
                self.data.photographs is None and any(stage.photographs for stage in self.stages)
            ),
            "stages: photographs need expressions, want expressions over 0": any(
                stage.photographs and not stage.expressions for stage in self.stages
            ),
            "optimiser.muon: needs whole matrices, want parallel: ddp": (
                self.parallel == "fsdp" and self.optimiser.muon
            ),
            "stages: epochs pass over datasets, want data.datasets": (
                not self.data.datasets and any(stage.epochs for stage in self.stages)
            ),
            "model: got nothing, want a preset, a configuration, or init_from": (
                not self.model and not self.init_from
            ),
            "validation.frames: generated clips have a length, want a number": (
                self.validation.frames is None and self.validation.dataset is None
            ),
            "trunk: a checkpoint has its own, want init_from or trunk": (
                self.trunk is not None and self.init_from is not None
            ),
            "detector: a checkpoint has its own, want init_from or detector": (
                self.detector is not None and self.init_from is not None
            ),
            "sam: only an init_from that is a delta is built on it": self.sam
            and not self.init_from,
        }
        if failed := [message for message, fails in problems.items() if fails]:
            raise ValueError("; ".join(failed))
        return self

    @property
    def architecture(self) -> RefSAMConfig:
        """The configuration that `model` means without `init_from`."""
        return _architecture(self.model)

    def changed_architecture(self, config: RefSAMConfig | EVFConfig) -> RefSAMConfig:
        """The configuration of the checkpoint `init_from`, overridden by the entries of `model`; raises ConfigError."""
        if not isinstance(config, RefSAMConfig):
            raise ConfigError(f"init_from: got {self.init_from}, which is EVF-SAM, wanted RefSAM")
        values = dict(self.model)
        preset = values.pop("preset", None)
        if preset is not None:
            wanted, found = _architecture({"preset": preset}).image_encoder, config.image_encoder
            sizes = [(e.embed_dim, e.depth, e.num_heads) for e in (wanted, found)]
            if sizes[0] != sizes[1]:
                raise ConfigError(
                    f"model: got the preset {preset} of width, depth and heads {sizes[0]}, but {self.init_from} has {sizes[1]}"
                )
        return config_from_dict(RefSAMConfig, _merged(config_to_dict(config), values))


def _architecture(model: dict[str, Any]) -> RefSAMConfig:
    """A preset with its entries overridden, or a whole configuration; raises ConfigError."""
    values = dict(model)
    preset = values.pop("preset", None)
    if preset is None:
        return config_from_dict(RefSAMConfig, values)
    if preset not in PRESETS:
        raise ConfigError(f"preset: got {preset!r}, wanted one of {', '.join(PRESETS)}")
    return config_from_dict(RefSAMConfig, _merged(PRESETS[preset], values))


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested plain values, with entries overridden by `changes`."""
    result = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        # Another kind of text encoder has other entries.
        both = both and value.get("kind", result[key].get("kind")) == result[key].get("kind")
        result[key] = _merged(result[key], value) if both else value
    return result
