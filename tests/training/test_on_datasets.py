"""Training on datasets: what is drawn reaches the losses, resumes exactly, and says what could not be read."""

import json
from pathlib import Path

import pytest
import torch

from refsam.config import config_from_dict
from refsam.data import DataError
from refsam.errors import ConfigError, UserError
from refsam.training.batches import DatasetStream, batches
from refsam.training.loop import Trainer
from refsam.training.settings import OptimiserSettings, TrainingSettings
from tests.data import fixtures
from tests.tiny_model import CONFIG

AUGMENTATION = {"crop_from": [44], "crop_sides": [36, 60], "short_sides": [40, 56], "long_side": 80}


def settings(folder: Path, output: str = "run", **changes) -> TrainingSettings:
    values = {
        "model": CONFIG,
        "output": str(folder / output),
        "data": {
            "datasets": [
                {"name": "ref-youtube-vos", "root": str(folder / "videos")},
                {"name": "refcoco", "root": str(folder / "images"), "weight": 2.0},
            ],
            "augmentation": AUGMENTATION,
        },
        "stages": [{"steps": 4, "clips": 2, "frames": 2, "expressions": 2}],
        "loss": {"focal": 1.0, "dice": 1.0, "iou": 0.5},
        "save_every": 2,
        "log_every": 1,
    }
    return config_from_dict(TrainingSettings, values | changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fixtures.write_ref_youtube_vos(tmp_path / "videos")
    (tmp_path / "images").mkdir()
    fixtures.write_refcoco(tmp_path / "images")
    return tmp_path


def totals(trainer: Trainer) -> list[float]:
    return [record["total"] for record in trainer.run()]


def test_a_run_resumes_to_the_same_losses_with_or_without_workers(folder: Path) -> None:
    whole = totals(Trainer(settings(folder)))
    assert len(whole) == 4
    first = Trainer(settings(folder, "cut")).run()
    (
        next(first),
        next(first),
        next(first),
    )  # killed after the third step: the state of step 2 is on disk
    assert totals(Trainer(settings(folder, "cut", workers=1))) == whole[2:]
    log = [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]
    (notes,) = (line["data"] for line in log if "data" in line)
    assert "left out 1 images" in notes[0]


def test_clips_of_other_sizes_count_alike(folder: Path) -> None:
    """The losses of a padded batch are the mean of those of its clips alone."""
    trainer = Trainer(
        settings(folder, stages=[{"steps": 9, "clips": 1, "frames": 1, "expressions": 2}])
    )
    stage = trainer.settings.stages[0]
    stream = DatasetStream(trainer.settings, trainer.datasets)
    singles = list(batches(stream, 0, 3, workers=0))
    assert len({batch.clips.sizes for batch in singles}) > 1
    three = settings(folder, stages=[{"steps": 3, "clips": 3, "frames": 1, "expressions": 2}])
    (together, *_) = batches(DatasetStream(three, trainer.datasets), 0, 1, workers=0)
    assert together.clips.names == tuple(batch.clips.names[0] for batch in singles)
    with torch.no_grad():
        apart = [trainer.module(batch, stage)["total"] for batch in singles]
        total = trainer.module(together, stage)["total"]
    assert total.item() == pytest.approx(torch.stack(apart).mean().item(), rel=1e-5)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_files_stop_with_one_line_or_are_counted(folder: Path, workers: int) -> None:
    for path in (folder / "videos/train/JPEGImages/0062f687f1").iterdir():
        path.write_bytes(path.read_bytes()[:400])
    data = {"datasets": [{"name": "ref-youtube-vos", "root": str(folder / "videos")}]}
    data["augmentation"] = AUGMENTATION
    with pytest.raises(DataError, match=r"0062f687f1/\d+\.jpg: cannot be read") as error:
        totals(Trainer(settings(folder, data=data, workers=workers)))
    assert "Traceback" not in str(error.value)
    skipping = settings(folder, "skip", data=data | {"unreadable": "skip"}, workers=workers)
    records = list(Trainer(skipping).run())
    log = [json.loads(line) for line in (folder / "skip/log.jsonl").read_text().splitlines()]
    named = [message for line in log for message in line.get("skipped", [])]
    assert len(named) == records[-1]["unreadable"] > 0


def test_a_loss_that_is_no_number_names_the_sample(folder: Path) -> None:
    trainer = Trainer(settings(folder))
    steps = trainer.run()
    next(steps), next(steps)
    with torch.no_grad():
        next(trainer.model.cross_modal_mlp.parameters()).fill_(float("nan"))
    with pytest.raises(
        UserError, match=r"at step 2 .* on (refcoco|ref-youtube-vos) train .*frames"
    ):
        next(steps)
    assert (folder / "run/state.safetensors").exists()


def test_parts_have_their_own_rates(folder: Path) -> None:
    optimiser = {"learning_rate": 1e-4, "warm_up_steps": 0, "lr_overrides": {"mask_decoder": 1e-6}}
    trainer = Trainer(settings(folder, optimiser=optimiser))
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    next(trainer.run())
    # AdamW's first step is the learning rate, whatever the gradient; decay adds a little.
    moved = {
        part: max(
            (value - before[name]).abs().max().item()
            for name, value in trainer.model.named_parameters()
            if name.startswith(part)
        )
        for part in ("mask_decoder", "cross_modal_mlp", "dense_attention")
    }
    assert moved["mask_decoder"] == pytest.approx(1e-6, rel=0.2)
    assert moved["cross_modal_mlp"] == pytest.approx(1e-4, rel=0.2)
    assert moved["dense_attention"] == pytest.approx(1e-4, rel=0.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"objects": 1.0}}, "loss.objects"),
        ({"stages": [{"steps": 1, "clips": 1, "expressions": 0}]}, "expressions is 0"),
        ({"data": {"datasets": [{"name": "mevis", "rooot": "x"}]}}, "rooot"),
        ({"data": {"augmentation": {"flip": 1.5}}}, "flip"),
    ],
)
def test_settings_that_contradict_datasets(folder: Path, changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(folder, **changes)


def test_a_rate_for_a_part_that_is_not_trained(folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"nothing to train in decoder, want some of .*mask_decoder"
    ):
        Trainer(
            settings(
                folder, optimiser=vars(OptimiserSettings()) | {"lr_overrides": {"decoder": 1e-6}}
            )
        )
