"""Monitoring of a run: scores on clips that it is not trained on, curves, examples, operations of a step."""

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from refsam.checkpoint import Source, is_base, is_sam, write_checkpoint
from refsam.config import RefSAMConfig
from refsam.data import DataError
from refsam.errors import CheckpointError
from refsam.model import RefSAM
from refsam.training import flops
from refsam.training.batches import stage_at
from refsam.training.loop import Trainer
from refsam.training.monitoring import measure_peak_flops
from refsam.training.settings import ValidationSettings
from refsam.training.validation import open_clips, predict, score_clips
from refsam_kernels import (
    AdapterWeights,
    AttentionWeights,
    adapter_mlp,
    adapter_projection,
    dense_attention,
    flop_formulas,
    mask_upscale,
    rel_pos_attention,
    token_image_attention,
)
from tests.data import fixtures
from tests.tiny_model import tiny_model
from tests.training.runs import losses_of, run_settings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fixtures.write_ref_youtube_vos(tmp_path / "videos")
    return tmp_path


def validation(folder: Path, **changes: Any) -> dict[str, Any]:
    dataset = {"name": "ref-youtube-vos", "root": str(folder / "videos")}
    return {"every": 2, "clips": 2, "frames": 3, "examples": 1, "dataset": dataset} | changes


def test_validation_scores_logs_draws_and_keeps_the_best(folder: Path) -> None:
    settings = run_settings(folder, "run", validation=validation(folder))
    trainer = Trainer(settings)
    records = list(trainer.run())
    scores = {record["step"]: record for record in records if "J&F" in record}
    assert list(scores) == [2, 4]
    for record in scores.values():
        assert record["J&F"] == pytest.approx((record["J"] + record["F"]) / 2)
    lines = [json.loads(line) for line in (folder / "run/log.jsonl").read_text().splitlines()]
    assert [line for line in lines if "J&F" in line] == list(scores.values())
    best = max(scores, key=lambda step: (scores[step]["J&F"], -step))
    assert trainer.progress.best == scores[best]["J&F"] and trainer.progress.best_step == best
    examples = sorted(path.name for path in (folder / "run/examples").iterdir())
    assert examples == ["000002_00.png", "000004_00.png"]
    # Prediction and truth, side by side.
    width, height = Image.open(folder / "run/examples" / examples[0]).size
    frame = Image.open(next((folder / "videos").rglob("*.jpg"))).size
    assert (width, height) == (2 * frame[0], frame[1])
    # The scored weights are the saved ones: the averaged weights.
    clips = open_clips(settings.validation, 64)
    assert clips is not None
    saved = RefSAM.from_pretrained(str(folder / "run/best"))
    rows = score_clips(saved, clips, range(len(clips)))
    assert np.mean(rows) == pytest.approx(scores[best]["J&F"])


def test_validation_changes_no_loss(folder: Path) -> None:
    without = losses_of(Trainer(run_settings(folder, "plain", validation={})))
    assert losses_of(Trainer(run_settings(folder, "run", validation=validation(folder)))) == without


def test_the_score_of_a_perfect_model_is_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = open_clips(ValidationSettings(**validation(folder)), 64)
    assert clips is not None and len(clips) == 2
    monkeypatch.setattr("refsam.training.validation.predict", lambda model, clip: clip.masks)
    assert set(score_clips(tiny_model(), clips, range(2))) == {(1.0, 1.0)}


def test_an_expression_that_is_not_understood_marks_nothing(folder: Path) -> None:
    listing = folder / "videos/meta_expressions/train/meta_expressions.json"
    content = json.loads(listing.read_text())
    for video in content["videos"].values():
        for expression in video["expressions"].values():
            expression["exp"] = "xylophone"
    listing.write_text(json.dumps(content))
    clips = open_clips(ValidationSettings(**validation(folder)), 64)
    assert clips is not None
    assert clips[0]().texts[0] == "xylophone" and clips[0]().masks.any()
    assert not predict(tiny_model(), clips[0]()).any()


def test_masks_that_are_not_public_are_refused(folder: Path) -> None:
    settings = validation(folder)
    settings["dataset"]["split"] = "valid"
    with pytest.raises(DataError, match=r"validation\.dataset: the masks of .* are not there"):
        open_clips(ValidationSettings(**settings), 64)


def test_generated_clips_are_drawn_again() -> None:
    clips = open_clips(ValidationSettings(every=1, clips=3, frames=2), 64)
    assert clips is not None and len(clips) == 3
    for index in range(3):
        one, again = clips[index](), clips[index]()
        assert one.frames.shape == (2, 36, 64, 3) and one.masks.shape == (2, 2, 36, 64)
        assert np.array_equal(one.frames, again.frames) and one.texts == again.texts


def test_curves_hold_what_the_log_holds(folder: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    settings = run_settings(folder, "run", validation=validation(folder))
    records = [record for record in Trainer(settings).run() if "total" in record]
    events = accumulator.EventAccumulator(str(folder / "run/tensorboard")).Reload()
    assert [e.step for e in events.Scalars("total")] == [1, 2, 3, 4]
    expected = [record["total"] for record in records]
    assert [e.value for e in events.Scalars("total")] == pytest.approx(expected, rel=1e-6)
    assert [e.step for e in events.Images("example_00")] == [2, 4]


def test_speed_memory_and_use_of_the_device_are_told(folder: Path) -> None:
    settings = run_settings(folder, "run", clips=2, peak_tflops=1.0, validation={})
    trainer = Trainer(settings)
    record = list(trainer.run())[-1]
    assert record["clips_per_second"] == pytest.approx(2 / record["seconds_per_step"])
    assert 0.05 < record["peak_memory_gib"] < 50
    expected = trainer._flops_of_step / record["seconds_per_step"] / 1e12
    assert record["mfu"] == pytest.approx(expected) and record["mfu"] > 0


def test_counting_operations_changes_no_loss(folder: Path) -> None:
    plain = losses_of(Trainer(run_settings(folder, "plain", validation={})))
    counted = run_settings(folder, "counted", peak_tflops=1.0, validation={})
    assert losses_of(Trainer(counted)) == plain


def test_operations_do_not_depend_on_recomputation(folder: Path) -> None:
    counts = []
    for checkpointing in (False, True):
        trainer = Trainer(run_settings(folder, "run", activation_checkpointing=checkpointing))
        batch, stage = next(trainer._batches()), stage_at(trainer.settings.stages, 0)
        counts.append(flops.count_flops(trainer.module, trainer.model, batch, stage))
        assert trainer.model.image_encoder.activation_checkpointing == checkpointing
    assert counts[0] == counts[1] > 0


def test_a_frozen_model_needs_fewer_operations(folder: Path) -> None:
    counts = {}
    for frozen in (False, True):
        settings = run_settings(folder, "run")
        model = settings.model | {"frozen": frozen}
        trainer = Trainer(run_settings(folder, f"run {frozen}", model=model))
        batch, stage = next(trainer._batches()), stage_at(settings.stages, 0)
        counts[frozen] = flops.count_flops(trainer.module, trainer.model, batch, stage)
    assert counts[True] < counts[False]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


D, C, H = 16, 16, 2
ADAPTER = AdapterWeights(random(4, D), random(4), random(D, 4), random(D))
ATTENTION = AttentionWeights(*(random(*s) for s in ((8, C), (8,)) * 3), random(C, 8), random(C))
CALLS = {
    "rel_pos_attention, global": lambda b: rel_pos_attention(
        random(2, 6, 6, 3 * D), random(11, 8), random(11, 8), num_heads=H, backend=b
    ),
    "rel_pos_attention, windows": lambda b: rel_pos_attention(
        random(2, 6, 6, 3 * D), random(5, 8), random(5, 8), num_heads=H, window_size=3, backend=b
    ),
    "adapter_projection": lambda b: adapter_projection(
        random(2, 4, 4, D), random(2, 4, 4, D), random(D, D), random(D), ADAPTER, random(D),
        random(D), backend=b,
    )[0],
    "adapter_mlp": lambda b: adapter_mlp(
        random(2, 4, 4, D), random(2, 4, 4, D), random(32, D), random(32), random(D, 32),
        random(D), ADAPTER, backend=b,
    )[0],
    "token_image_attention": lambda b: token_image_attention(
        random(3, 5, C), random(3, 36, C), random(3, 5, C), random(1, 36, C), ATTENTION, random(C),
        random(C), num_heads=H, backend=b,
    ),
    "dense_attention": lambda b: dense_attention(
        random(2, 1, 36, C), random(1, 4, C), torch.tensor([4]), torch.tensor([0]),
        random(C, 2 * C), random(C), torch.tensor(1.0), torch.tensor([0.5, 0.5]), backend=b,
    ),
    "mask_upscale": lambda b: mask_upscale(
        random(3, 6, 6, C), random(3, 1, C // 8), random(C, C // 4, 2, 2), random(C // 4),
        random(C // 4), random(C // 4), random(C // 4, C // 8, 2, 2), random(C // 8), backend=b,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_operations_of_an_operator_are_those_of_its_formula(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch counts the products of the formula, forward; the backward has twice as many.

    Dense attention is the exception: half of its projection is taken of the words, which are few.
    """
    operator = name.partition(",")[0]
    module = __import__(f"refsam_kernels.{operator}.reference", fromlist=["forward"])
    plain, forward = FlopCounterMode(display=False), module.forward

    def counted(*arguments: Any) -> Any:
        with plain:
            return forward(*arguments)

    monkeypatch.setattr(module, "forward", counted)
    with torch.no_grad():
        CALLS[name]("reference")
    monkeypatch.undo()
    ours = FlopCounterMode(display=False, custom_mapping=flop_formulas())
    with ours:
        result = CALLS[name]("fallback")
    spared = 2 * 2 * 36 * C * C if operator == "dense_attention" else 0
    assert ours.get_total_flops() == plain.get_total_flops() - spared
    both = FlopCounterMode(display=False, custom_mapping=flop_formulas())
    with both:
        CALLS[name]("fallback").sum().backward()
    assert both.get_total_flops() == pytest.approx(3 * ours.get_total_flops(), rel=1e-9)
    assert result.requires_grad


def test_the_peak_is_a_plausible_number() -> None:
    assert 1e8 < measure_peak_flops(torch.device("cpu"), torch.float32) < 1e15


def test_models_that_stand_on_sam_are_saved_as_deltas(folder: Path) -> None:
    """`delta` leaves out what SAM's file holds; init_from names that file again for the next stage."""
    sam = folder / "sam"
    base = tiny_model()
    values = base.config.to_dict() | {"frozen": True}
    stored = replace(
        base.to_checkpoint(),
        config=RefSAMConfig.from_dict(values),
        kind="sam",
        tensors={n: t for n, t in base.state_dict().items() if is_sam(n)},
        sources={"sam": Source("sam_tiny.pth", "0" * 64)},
    )
    write_checkpoint(sam, stored)
    first = run_settings(folder, "first", init_from=str(sam), model={})
    list(Trainer(first).run())
    for name in ("model", "best"):
        header = json.loads((folder / "first" / name / "config.json").read_text())
        assert header["kind"] == "delta"
    with pytest.raises(CheckpointError, match=r"is a delta and needs sam_tiny\.pth"):
        Trainer(run_settings(folder, "second", init_from=str(folder / "first/model")))
    second = Trainer(
        run_settings(folder, "second", init_from=str(folder / "first/model"), sam=str(sam))
    )
    state = second.model.state_dict()
    assert all(torch.equal(state[n], t) for n, t in base.state_dict().items() if is_base(n))
    list(Trainer(run_settings(folder, "whole", init_from=str(sam), delta=False)).run())
    assert json.loads((folder / "whole/model/config.json").read_text())["kind"] == "full"


@pytest.mark.parametrize("fails", ["", "init", "log", "finish"])
def test_weights_and_biases_get_the_log_and_never_end_a_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    seen: list[tuple[str, Any]] = []

    def act(name: str) -> Any:
        def called(*values: object, **named: object) -> object:
            if name == fails:
                raise RuntimeError("no API key")
            seen.append((name, values or named))
            return run

        return called

    run = SimpleNamespace(log=act("log"), finish=act("finish"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=act("init")))
    said: list[str] = []
    trainer = Trainer(run_settings(folder, "run", steps=2, wandb="project"), said.append)
    with (
        pytest.warns(UserWarning, match="no API key")
        if fails in ("log", "finish")
        else nullcontext()
    ):
        losses_of(trainer)
    assert ("log: no Weights & Biases: no API key" in said) == (fails == "init")
    logged = [values[0] for name, values in seen if name == "log" and "total" in values[0]]
    assert len(logged) == (0 if fails in ("init", "log") else 2)
