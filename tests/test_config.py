"""Configurations: presets, YAML there and back, overrides, and every error in one line."""

import dataclasses
from pathlib import Path

import pytest

from refsam import RefSAMConfig
from refsam.config import PRESETS
from refsam.errors import ConfigError, UserError


@pytest.mark.parametrize(
    ("name", "dim", "depth", "heads", "blocks"),
    [
        ("vit_b", 768, 12, 12, (2, 5, 8, 11)),
        ("vit_l", 1024, 24, 16, (5, 11, 17, 23)),
        ("vit_h", 1280, 32, 16, (7, 15, 23, 31)),
    ],
)
def test_presets_have_the_sizes_of_sam(
    name: str, dim: int, depth: int, heads: int, blocks: tuple[int, ...]
) -> None:
    encoder = RefSAMConfig.preset(name).image_encoder
    assert (encoder.embed_dim, encoder.depth, encoder.num_heads) == (dim, depth, heads)
    assert encoder.global_blocks == blocks
    assert (encoder.image_size, encoder.patch_size, encoder.window_size) == (1024, 16, 14)


@pytest.mark.parametrize("name", PRESETS)
def test_yaml_gives_back_an_equal_configuration(name: str, tmp_path: Path) -> None:
    config = RefSAMConfig.preset(name)
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert RefSAMConfig.from_yaml(file) == config
    assert hash(RefSAMConfig.from_dict(config.to_dict())) == hash(config)


def test_configurations_are_frozen() -> None:
    config = RefSAMConfig.preset("nano")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.prompt_dim = 8  # type: ignore[misc]


def test_overrides_change_what_they_name_and_nothing_else(tmp_path: Path) -> None:
    config = RefSAMConfig.preset("nano")
    changed = config.override(
        "image_encoder.depth=3", "image_encoder.global_blocks=[0, 2]", "frozen=true"
    )
    assert changed.image_encoder.global_blocks == (0, 2)
    encoder = dataclasses.replace(config.image_encoder, depth=3, global_blocks=(0, 2))
    assert changed == dataclasses.replace(config, image_encoder=encoder, frozen=True)
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert RefSAMConfig.from_yaml(file, ["prompt_dim=64"]).prompt_dim == 64


def test_every_bad_entry_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        RefSAMConfig.preset("nano").override(
            "image_encoder.dept=3",
            "image_encoder.embed_dim=-1",
            "text_encoder.width=wide",
            "text_encoder.colour=red",
            "speed=9",
        )
    message = str(caught.value)
    for entry in (
        "image_encoder.dept: unknown key",
        "image_encoder.embed_dim",
        "text_encoder.width",
        "text_encoder.colour: unknown key",
        "speed: unknown key",
        "'wide'",
    ):
        assert entry in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("image_encoder.embed_dim=769", "embed dim must be a multiple of num heads"),
        ("image_encoder.image_size=100", "image size must be a multiple of patch size"),
        ("image_encoder.global_blocks=[2, 12]", "below depth"),
        ("image_encoder.global_blocks=[5, 2]", "increasing"),
        ("prompt_dim=12", "prompt dim must be a multiple of 8"),
        ("prompt_dim=24", "num heads times downsample rate"),
        ("text_encoder.kind=bert", "text_encoder"),
        ("image_encoder=7", "image_encoder"),
    ],
)
def test_contradictions_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RefSAMConfig.preset("vit_b").override(override)


def test_overrides_need_the_form_key_equals_value() -> None:
    with pytest.raises(ConfigError, match=r"got 'depth', '=3', wanted key=value"):
        RefSAMConfig.preset("nano").override("depth", "=3", "prompt_dim=64")


def test_unknown_presets_and_files_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wanted one of vit_b, vit_l, vit_h, nano"):
        RefSAMConfig.preset("huge")
    with pytest.raises(UserError, match="cannot be read"):
        RefSAMConfig.from_yaml(tmp_path / "missing.yaml")
    for text, message in (("a: [1", "not valid YAML"), ("- 1", "wanted a mapping")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            RefSAMConfig.from_yaml(tmp_path / "bad.yaml")
