"""Training on photographs: the mixture with generated clips, words, and pixels that count for no loss."""

import json
from pathlib import Path

import pytest
import torch

from refsam.data import DataError
from refsam.errors import ConfigError
from refsam.model import FrameSize, MaskOutput, RefSAM, word_tokenizer
from refsam.model.vocabulary import mark_untaught
from refsam.training.batches import GeneratedStream, open_photographs
from refsam.training.loop import Trainer
from refsam.training.losses import actual_iou, mask_losses
from refsam.training.settings import LossSettings
from tests.data.photograph_fixtures import write_photographs
from tests.training.test_loop import settings

STAGE = {"steps": 3, "clips": 2, "frames": 2, "expressions": 3, "loss_scale": 2}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photographs(tmp_path_factory.mktemp("photographs"))


def mixed(output: Path, root: Path, share: float = 0.5, **changes):
    data = {"photographs": {"root": str(root), "only_cut_out": ["dogs"], "cached": 4}}
    stages = [STAGE | {"photographs": share}]
    return settings(output, **{"stages": stages, "data": data} | changes)


def output_of(logits: torch.Tensor) -> MaskOutput:
    count = len(logits)
    return MaskOutput(logits, torch.zeros(count), torch.zeros(count, 8), torch.zeros(count, 8))


@pytest.mark.parametrize("scale", [1, 2])
def test_ignored_pixels_count_for_no_loss(scale: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 16, 16, requires_grad=True)
    masks = torch.rand(2, 64, 64) < 0.5
    ignore = torch.zeros(2, 64, 64, dtype=torch.bool)
    ignore[:, :, 32:] = True
    size, weights = FrameSize((64, 64), (64, 64)), LossSettings(iou=1.0)
    losses = mask_losses(output_of(logits), masks, ignore, size, 64, weights, scale)
    (losses["focal"] + losses["dice"]).backward()
    assert logits.grad is not None
    assert (logits.grad[:, :, 10:] == 0).all() and (logits.grad[:, :, :6] != 0).any()
    other = masks.clone()
    other[:, :, 32:] ^= True
    again = mask_losses(output_of(logits), other, ignore, size, 64, weights, scale)
    assert all(torch.equal(losses[name], again[name]) for name in losses)
    everything = mask_losses(output_of(logits), masks, None, size, 64, weights, scale)
    assert not torch.equal(everything["dice"], losses["dice"])


def test_iou_leaves_ignored_pixels_out() -> None:
    logits = torch.full((1, 16, 16), -1.0)
    logits[:, :8] = 1
    masks = torch.zeros(1, 64, 64, dtype=torch.bool)
    masks[:, :16] = True
    ignore = torch.zeros_like(masks)
    ignore[:, 16:32] = True
    size = FrameSize((64, 64), (64, 64))
    assert actual_iou(logits, masks, None, size, 64).item() == pytest.approx(0.5)
    assert actual_iou(logits, masks, ignore, size, 64).item() == 1


def test_stage_mixes_photographs_and_generated_clips(tmp_path: Path, root: Path) -> None:
    run = mixed(tmp_path, root, stages=[STAGE | {"steps": 30, "photographs": 0.5}])
    stream = GeneratedStream(run, 64, drawer=open_photographs(run.data.photographs))
    batches = [stream[index] for index in range(30)]
    from_photographs = [batch for batch in batches if batch.clips.ignore is not None]
    assert 8 <= len(from_photographs) <= 22
    for batch in batches:
        assert (batch.attributes is None) == (batch.clips.ignore is not None)
        assert batch.clips.frames.shape[2:4] == batch.clips.sizes[0]
        assert max(batch.clips.sizes[0]) == 64
    assert any(batch.clips.ignore.any() for batch in from_photographs)
    again = stream[batches.index(from_photographs[0])]
    assert again.clips.frames.equal(from_photographs[0].clips.frames)


def test_a_run_learns_the_words_of_the_photographs(tmp_path: Path, root: Path) -> None:
    records = list(Trainer(mixed(tmp_path / "run", root)).run())
    assert len(records) == 3
    model = RefSAM.from_pretrained(str(tmp_path / "run" / "model"))
    assert model.encode_text(["the puppy", "the drone", "two airplanes"]).unknown[:2] == ((), ())


def test_a_start_keeps_its_words_and_learns_new_ones(tmp_path: Path, root: Path) -> None:
    small = mixed(tmp_path / "run", root).architecture
    model = RefSAM(small, tokenizer=word_tokenizer(["the", "red", "cup"]))
    mark_untaught(model, ["cup"])
    model.save_pretrained(tmp_path / "start")
    trainer = Trainer(mixed(tmp_path / "run", root, init_from=str(tmp_path / "start")))
    rows = trainer.model.text_encoder.words.weight
    assert torch.equal(rows[:5], model.text_encoder.words.weight)
    assert trainer.model.encode_text(["the puppy", "the cup"]).unknown == ((), ())


def test_no_folder_is_told_with_the_way_out(tmp_path: Path) -> None:
    run = mixed(tmp_path, tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"data.photographs.root: no folder .*nowhere; give yours"):
        Trainer(run)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"data": {}}, "data.photographs: a stage takes photographs"),
        ({"stages": [STAGE | {"expressions": 0, "photographs": 0.5}]}, "want expressions over 0"),
        ({"stages": [STAGE | {"photographs": 1.5}]}, "photographs"),
        ({"data": {"photographs": {"root": "x", "balance": 2}}}, "balance"),
        (
            {"data": {"photographs": {"root": "x"}, "datasets": [{"name": "folder", "root": "x"}]}},
            "one of the two",
        ),
    ],
)
def test_contradictions_are_told(tmp_path: Path, root: Path, changes, wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        mixed(tmp_path, root, **changes)


def test_state_resumes_with_photographs(tmp_path: Path, root: Path) -> None:
    whole = list(Trainer(mixed(tmp_path / "whole", root, share=1.0)).run())
    first = Trainer(mixed(tmp_path / "parts", root, share=1.0, save_every=1))
    records = first.run()
    next(records)
    records.close()
    rest = list(Trainer(mixed(tmp_path / "parts", root, share=1.0, save_every=1)).run())
    assert [r["total"] for r in rest] == [r["total"] for r in whole][-len(rest) :]
    assert json.loads((tmp_path / "parts" / "log.jsonl").read_text().splitlines()[-1])["step"] == 3
