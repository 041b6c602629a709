"""Every old name still works and says what it is called now; the table of them is `refsam.renamed`."""

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from refsam import cli, renamed
from refsam.config import config_from_dict
from refsam.errors import ConfigError
from refsam.model.image_encoder import ImageEncoder
from refsam.session import Shard, segment_videos
from refsam.training.settings import OptimiserSettings, StageSettings, TrainingSettings

PYTHON = [(m, old, new) for m, names in renamed.PYTHON_NAMES.items() for old, new in names.items()]
KEYS = [(s, old, new) for s, names in renamed.SETTINGS.items() for old, new in names.items()]
VALUES = [(k, old, new) for k, names in renamed.VALUES.items() for old, new in names.items()]
OPTIONS = [(c, o) for c, options in renamed.OPTIONS.items() for o in options]
SOME = {
    "lr_overrides": {"mask_decoder": 1e-6},
    "max_grad_norm": 2.0,
    "gradient_accumulation_steps": 3,
    "ema_decay": 0.5,
    "tbptt_frames": 2,
    "init_from": "nano",
    "activation_checkpointing": True,
}
RUN = {"model": {"preset": "nano"}, "output": "out", "stages": [{"steps": 1, "clips": 1}]}


@pytest.mark.parametrize(("module", "old", "new"), PYTHON)
def test_python_names(module: str, old: str, new: str) -> None:
    with pytest.warns(renamed.RenamedWarning, match=f"{old} is now {new}"):
        found = getattr(import_module(module), old)
    assert found is getattr(import_module(module), new)


def test_names_that_never_were_are_still_errors() -> None:
    with pytest.raises(AttributeError, match="step_apart"):
        import_module("refsam.session").step_apart  # noqa: B018


def test_keyword_arguments(tmp_path: Path) -> None:
    assert renamed.ARGUMENTS == {"segment_videos": {"share": "shard"}}
    model: Any = None  # there is nothing to segment
    with pytest.warns(renamed.RenamedWarning, match="share=.* is now shard="):
        assert segment_videos(model, [], ["a dog"], tmp_path, share=Shard(1, 2)) == []  # type: ignore[call-arg]


def test_attributes() -> None:
    assert renamed.ATTRIBUTES == {"ImageEncoder": {"recompute": "activation_checkpointing"}}
    encoder = ImageEncoder.__new__(ImageEncoder)
    with pytest.warns(renamed.RenamedWarning, match="activation_checkpointing"):
        encoder.recompute = True
    assert encoder.activation_checkpointing
    with pytest.warns(renamed.RenamedWarning, match="activation_checkpointing"):
        assert encoder.recompute


def section_of(settings: TrainingSettings, section: str) -> Any:
    """The settings of a section; the first stage for `stages`."""
    return {"": settings, "stages": settings.stages[0], "optimiser": settings.optimiser}[section]


def with_entry(section: str, **entry: Any) -> dict[str, Any]:
    """A run's values with one more entry."""
    if section == "stages":
        return RUN | {"stages": [RUN["stages"][0] | entry]}  # type: ignore[operator]
    return RUN | (entry if not section else {section: entry})


@pytest.mark.parametrize(("section", "old", "new"), KEYS)
def test_keys_of_configuration_files(section: str, old: str, new: str, tmp_path: Path) -> None:
    values, path = with_entry(section, **{old: SOME[new]}), tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.warns(renamed.RenamedWarning, match=f"{old} is now {new}"):
        settings = TrainingSettings.from_yaml(path)
    assert getattr(section_of(settings, section), new) == SOME[new]
    assert settings == config_from_dict(TrainingSettings, with_entry(section, **{new: SOME[new]}))
    with (
        pytest.warns(renamed.RenamedWarning),
        pytest.raises(ConfigError, match=f"{old}: got it and {new}"),
    ):
        config_from_dict(TrainingSettings, with_entry(section, **{old: SOME[new], new: SOME[new]}))


@pytest.mark.parametrize("key", ["old", "new"])
@pytest.mark.parametrize(("section", "old", "new"), [k for k in KEYS if k[0] != "stages"])
def test_overrides_by_either_name(
    section: str, old: str, new: str, key: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(with_entry(section, **{old: None})))
    word = ".".join(filter(None, (section, old if key == "old" else new)))
    with pytest.warns(renamed.RenamedWarning):
        settings = TrainingSettings.from_yaml(path, [f"{word}={SOME[new]}"])
    assert getattr(section_of(settings, section), new) == SOME[new]


@pytest.mark.parametrize(("key", "old", "new"), VALUES)
def test_values_of_configuration_files(key: str, old: str, new: str) -> None:
    with pytest.warns(renamed.RenamedWarning, match=f"{key}: {old} is now {key}: {new}"):
        settings = config_from_dict(TrainingSettings, RUN | {key: old})
    assert getattr(settings, key) == new


def test_new_names_say_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for section, _, new in KEYS:
            config_from_dict(TrainingSettings, with_entry(section, **{new: SOME[new]}))
    fields = {"": TrainingSettings, "stages": StageSettings, "optimiser": OptimiserSettings}
    for section, old, _ in KEYS:
        assert old not in fields[section].__dataclass_fields__


@pytest.mark.parametrize("equals", [False, True])
@pytest.mark.parametrize(("command", "option"), OPTIONS)
def test_options(command: tuple[str, ...], option: renamed.Option, equals: bool) -> None:
    value = option.values[-1] if option.values else "x"
    words = [f"{option.old}={value}"] if equals else [option.old, value]
    expected = [f"{option.new}={value}"] if equals else [option.new, value]
    with pytest.warns(renamed.RenamedWarning, match=f"{option.old} is now {option.new}"):
        assert renamed.command_line([*command, *words]) == [*command, *expected]


def test_the_command_line_says_it_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", "ref-davis17", "--root", "nowhere", "--out", "out", "--protocol", "paper"]
    with pytest.raises(SystemExit, match="2"):
        cli.main([*words, "--joint", "logits", "--scoring", "coco"])
    lines = capsys.readouterr().err.splitlines()
    assert lines[:3] == [
        f"refsam: {old} is now {new}; the old name goes with version {renamed.REMOVED_IN}"
        for old, new in (
            ("--protocol", "--inference"),
            ("--joint", "--merge"),
            ("--scoring", "--protocol"),
        )
    ]
    assert len(lines) == 4 and "nowhere" in lines[3]


def test_scoring_rules_are_the_new_meaning_of_protocol() -> None:
    words = ["evaluate", "ref-davis17", "--protocol", "per-expression", "--inference", "paper"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert renamed.command_line(words) == words
