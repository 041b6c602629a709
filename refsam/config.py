"""Configurations: frozen dataclasses, presets, YAML, dotted overrides, all errors in one report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass

from refsam.errors import ConfigError

_CLOSED = ConfigDict(extra="forbid")
_TAGS = ("small", "t5", "roberta")
Config = TypeVar("Config")


def _demand(**conditions: bool) -> None:
    """Raise one ValueError that names every condition (underscores read as spaces) that fails."""
    failed = [name.replace("_", " ") for name, holds in conditions.items() if not holds]
    if failed:
        raise ValueError("; ".join(failed))


@dataclass(frozen=True, config=_CLOSED)
class ImageEncoderConfig:
    """Sizes of SAM's ViT and of its adapters; the defaults are ViT-B's.

    image_size and patch_size are in pixels, window_size in tokens. adapter_ratio is the hidden
    width of an adapter over embed_dim; 0 leaves the adapters out. padding: `square` fills frames up
    to image_size on both sides, as SAM does; `none` to whole patches, so that a 16:9 frame takes 44 %
    fewer tokens. trunk_width is that of a MobileNetV2 beside the patches; 0 leaves it out. detector:
    whether a YOLOX-Nano beside the trunk names things too.
    """

    image_size: PositiveInt = 1024
    patch_size: PositiveInt = 16
    embed_dim: PositiveInt = 768
    depth: PositiveInt = 12
    num_heads: PositiveInt = 12
    mlp_ratio: PositiveFloat = 4.0
    window_size: NonNegativeInt = 14
    global_blocks: tuple[NonNegativeInt, ...] = (2, 5, 8, 11)
    adapter_ratio: NonNegativeFloat = 0.25
    padding: Literal["square", "none"] = "square"
    trunk_width: NonNegativeFloat = 0.0
    detector: bool = False

    @model_validator(mode="after")
    def _check(self) -> ImageEncoderConfig:
        _demand(
            patch_size_must_be_16_with_a_trunk=not self.trunk_width or self.patch_size == 16,
            detector_must_be_beside_a_trunk=bool(self.trunk_width) or not self.detector,
            image_size_must_be_a_multiple_of_patch_size=self.image_size % self.patch_size == 0,
            embed_dim_must_be_a_multiple_of_num_heads=self.embed_dim % self.num_heads == 0,
            global_blocks_must_be_increasing_and_below_depth=(
                list(self.global_blocks) == sorted(set(self.global_blocks))
                and all(block < self.depth for block in self.global_blocks)
            ),
        )
        return self

    @property
    def multiplications(self) -> int:
        """Number of multiplications with SAM's weights per image, a measure of the encoder's size."""
        tokens = (self.image_size // self.patch_size) ** 2
        return 12 * tokens * self.depth * self.embed_dim**2


@dataclass(frozen=True, config=_CLOSED)
class SmallTextConfig:
    """Sizes of the project's own text encoder; its vocabulary is in the tokenizer.

    untaught: words of the vocabulary that name things which the model was not taught to find. They
    are reported like unknown words, and an expression that has no other noun is refused.
    """

    kind: Literal["small"] = "small"
    width: PositiveInt = 128
    depth: PositiveInt = 2
    num_heads: PositiveInt = 4
    mlp_ratio: PositiveFloat = 4.0
    max_words: PositiveInt = 32
    untaught: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> SmallTextConfig:
        _demand(width_must_be_a_multiple_of_num_heads=self.width % self.num_heads == 0)
        return self


@dataclass(frozen=True, config=_CLOSED)
class PretrainedTextConfig:
    """A frozen encoder of `transformers`: Hub id or folder, and the width of its output."""

    kind: Literal["t5", "roberta"] = "t5"
    name: str = "google-t5/t5-3b"
    width: PositiveInt = 1024
    max_tokens: PositiveInt = 512


@dataclass(frozen=True, config=_CLOSED)
class DenseAttentionConfig:
    """Hierarchical dense attention; initial_scale None means 1/sqrt(prompt_dim), the paper's."""

    hierarchical: bool = True
    learnable_scale: bool = True
    initial_scale: PositiveFloat | None = None


@dataclass(frozen=True, config=_CLOSED)
class MaskDecoderConfig:
    """Sizes of SAM's mask decoder."""

    depth: PositiveInt = 2
    num_heads: PositiveInt = 8
    mlp_dim: PositiveInt = 2048
    downsample_rate: PositiveInt = 2
    num_masks: PositiveInt = 4
    iou_hidden_dim: PositiveInt = 256


@dataclass(frozen=True, config=_CLOSED)
class RefSAMConfig:
    """Everything that defines RefSAM's architecture.

    frozen: SAM's ViT and positional encoding and the text encoder are not trained (paper,
    section 3.2); false trains every part.
    """

    image_encoder: ImageEncoderConfig = Field(default_factory=ImageEncoderConfig)
    text_encoder: Annotated[SmallTextConfig | PretrainedTextConfig, Field(discriminator="kind")] = (
        Field(default_factory=PretrainedTextConfig)
    )
    dense_attention: DenseAttentionConfig = Field(default_factory=DenseAttentionConfig)
    mask_decoder: MaskDecoderConfig = Field(default_factory=MaskDecoderConfig)
    prompt_dim: PositiveInt = 256
    cross_modal_layers: NonNegativeInt = 1
    tracking_hidden_dim: PositiveInt = 1024
    frozen: bool = True

    @model_validator(mode="after")
    def _check(self) -> RefSAMConfig:
        heads = self.mask_decoder.num_heads * self.mask_decoder.downsample_rate
        _demand(
            prompt_dim_must_be_a_multiple_of_8=self.prompt_dim % 8 == 0,
            prompt_dim_must_be_a_multiple_of_the_decoders_num_heads_times_downsample_rate=(
                self.prompt_dim % heads == 0
            ),
        )
        return self

    @classmethod
    def preset(cls, name: str) -> RefSAMConfig:
        """The configuration called vit_b, vit_l, vit_h or nano.

        Raises ConfigError for any other name.
        """
        if name not in PRESETS:
            raise ConfigError(f"preset: got {name!r}, wanted one of {', '.join(PRESETS)}")
        return config_from_dict(cls, PRESETS[name])

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RefSAMConfig:
        """Build from nested plain values; raises ConfigError with every bad entry."""
        return config_from_dict(cls, values)

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Iterable[str] = ()) -> RefSAMConfig:
        """Read a YAML file and apply overrides such as `image_encoder.depth=6`.

        Raises ConfigError with every bad entry.
        """
        return config_from_dict(cls, apply_overrides(read_yaml(path), overrides))

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, tuples as lists: what YAML and JSON hold."""
        return config_to_dict(self)

    def to_yaml(self) -> str:
        """The YAML text that `from_yaml` reads back to an equal configuration."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    def override(self, *overrides: str) -> RefSAMConfig:
        """A copy with dotted entries changed: `override("image_encoder.image_size=512")`."""
        return config_from_dict(type(self), apply_overrides(self.to_dict(), overrides))


@dataclass(frozen=True, config=_CLOSED)
class Beit3Config:
    """Sizes of BEiT-3; the defaults are those of its large scale.

    image_size and patch_size are in pixels. positions counts the rows of the words' position table, two of which
    are never used.
    """

    width: PositiveInt = 1024
    depth: PositiveInt = 24
    num_heads: PositiveInt = 16
    hidden: PositiveInt = 4096
    image_size: PositiveInt = 224
    patch_size: PositiveInt = 16
    vocabulary_size: PositiveInt = 64010
    positions: PositiveInt = 1024

    @model_validator(mode="after")
    def _check(self) -> Beit3Config:
        _demand(
            width_must_be_a_multiple_of_num_heads=self.width % self.num_heads == 0,
            image_size_must_be_a_multiple_of_patch_size=self.image_size % self.patch_size == 0,
            positions_must_be_at_least_4=self.positions > 3,
        )
        return self


@dataclass(frozen=True, config=_CLOSED)
class EVFConfig:
    """Everything that defines EVF-SAM's architecture; the defaults are those of SAM's ViT-H with BEiT-3 large."""

    image_encoder: ImageEncoderConfig = Field(
        default_factory=lambda: ImageEncoderConfig(
            embed_dim=1280, depth=32, num_heads=16, global_blocks=(7, 15, 23, 31), adapter_ratio=0
        )
    )
    mask_decoder: MaskDecoderConfig = Field(default_factory=MaskDecoderConfig)
    beit3: Beit3Config = Field(default_factory=Beit3Config)
    prompt_dim: PositiveInt = 256


def config_from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Validate nested plain values into the configuration class cls.

    Raises ConfigError, one line that names every unknown, mistyped or contradictory entry.
    """
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        raise ConfigError(f"{cls.__name__}: {_report(error)}") from None


def config_to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values of any configuration dataclass, tuples as lists."""
    return _plain(asdict(config))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The entries of a YAML file; raises ConfigError if it cannot be read or is not a mapping."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if values is not None and not isinstance(values, dict):
        raise ConfigError(f"{path}: got a YAML {type(values).__name__}, wanted a mapping")
    return values or {}


def apply_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of nested plain values with `dotted.key=value` entries set; values are read as YAML.

    Raises ConfigError that names every override without the form key=value.
    """
    overrides = list(overrides)
    malformed = [
        text for text in overrides if not text.partition("=")[0].strip() or "=" not in text
    ]
    if malformed:
        raise ConfigError(f"override: got {', '.join(map(repr, malformed))}, wanted key=value")
    result = _plain(dict(values))
    for text in overrides:
        key, _, value = text.partition("=")
        *parents, leaf = key.strip().split(".")
        node = result
        for parent in parents:
            child = node.get(parent)
            node[parent] = node = dict(child) if isinstance(child, dict) else {}
        node[leaf] = yaml.safe_load(value)
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _report(error: ValidationError) -> str:
    """Every entry of a pydantic report as `key: what is wrong (got ...)`, on one line."""
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"] if part not in _TAGS) or "configuration"
        got = "" if isinstance(item["input"], dict) else f" (got {item['input']!r})"
        message = "unknown key" if item["type"] == "unexpected_keyword_argument" else item["msg"]
        is_own = item["type"] == "value_error"
        lines.append(f"{key}: {message.removeprefix('Value error, ')}{'' if is_own else got}")
    return "; ".join(lines)


def _vit(dim: int, depth: int, heads: int, blocks: tuple[int, ...]) -> dict[str, Any]:
    sizes = {"embed_dim": dim, "depth": depth, "num_heads": heads, "global_blocks": blocks}
    return {"image_encoder": sizes}


PRESETS: dict[str, dict[str, Any]] = {
    "vit_b": _vit(768, 12, 12, (2, 5, 8, 11)),
    "vit_l": _vit(1024, 24, 16, (5, 11, 17, 23)),
    "vit_h": _vit(1280, 32, 16, (7, 15, 23, 31)),
    "nano": {
        "image_encoder": {
            "image_size": 384,
            "patch_size": 16,
            "embed_dim": 128,
            "depth": 7,
            "num_heads": 4,
            "window_size": 8,
            "global_blocks": (2, 5, 6),
            "padding": "none",
            "trunk_width": 1.0,
            "detector": True,
        },
        "text_encoder": {"kind": "small"},
        # Trained from scratch, the paper's nearly uniform attention would hardly move.
        "dense_attention": {"initial_scale": 10.0},
        "mask_decoder": {"num_heads": 4, "mlp_dim": 512, "iou_hidden_dim": 128},
        "prompt_dim": 128,
        "tracking_hidden_dim": 256,
        "frozen": False,
    },
}
