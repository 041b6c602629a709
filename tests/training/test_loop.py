"""The trainer: learns, resumes exactly, keeps what it had when something goes wrong."""

import json
from pathlib import Path

import pytest
import torch

from refsam.config import config_from_dict, config_from_yaml
from refsam.errors import UserError
from refsam.model import RefSAM
from refsam.training.loop import Trainer
from refsam.training.parameters import learning_rate
from refsam.training.settings import OptimiserSettings, TrainingSettings

ROOT = Path(__file__).parents[2]
TINY = {
    "image_encoder": {
        "image_size": 64,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "window_size": 4,
        "global_blocks": [1],
    },
    "text_encoder": {"kind": "small", "width": 32, "depth": 1, "num_heads": 2},
    "mask_decoder": {"depth": 1, "num_heads": 2, "mlp_dim": 32, "iou_hidden_dim": 16},
    "prompt_dim": 32,
    "tracking_hidden_dim": 32,
    "frozen": False,
}


def settings(output: Path, steps: int = 4, **changes) -> TrainingSettings:
    values = {
        "model": TINY,
        "output": str(output),
        "stages": [{"steps": steps, "clips": 2, "frames": 2, "expressions": 2, "loss_scale": 2}],
        "loss": {"focal": 20.0, "dice": 1.0, "iou": 0.5},
        "save_every": 2,
        "log_every": 1,
    }
    return config_from_dict(TrainingSettings, values | changes)


def test_a_run_writes_a_log_and_a_model_that_loads(tmp_path):
    records = list(Trainer(settings(tmp_path)).run())
    assert [record["step"] for record in records] == [1, 2, 3, 4]
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    model = RefSAM.from_pretrained(str(tmp_path / "model"))
    assert model.config.image_encoder.image_size == 64
    model.encode_text(["the red circle"])


def test_a_killed_run_resumes_to_the_same_weights(tmp_path):
    whole = Trainer(settings(tmp_path / "whole"))
    losses = [record["total"] for record in whole.run()]
    first = Trainer(settings(tmp_path / "cut"))
    for index, _ in enumerate(first.run()):
        if index == 2:  # killed after the third step: the state of step 2 is on disk
            break
    second = Trainer(settings(tmp_path / "cut"))
    assert [record["total"] for record in second.run()] == losses[2:]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_a_damaged_state_falls_back_to_the_one_before(tmp_path):
    list(Trainer(settings(tmp_path)).run())
    (tmp_path / "state.pt").write_bytes(b"damaged")
    trainer = Trainer(settings(tmp_path))
    trainer.resume()
    assert trainer.step == 2


def test_a_loss_that_is_no_number_stops_and_keeps_the_state(tmp_path):
    trainer = Trainer(settings(tmp_path))
    steps = iter(trainer.run())
    next(steps), next(steps)
    with torch.no_grad():
        trainer.model.cross_modal_mlp.requires_grad_(True)
        next(trainer.model.cross_modal_mlp.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="not a number at step 2"):
        next(steps)
    assert (tmp_path / "state.pt").exists()


def test_loss_falls_on_generated_clips(tmp_path):
    optimiser = {"learning_rate": 3e-3, "warm_up_steps": 3}
    changes = {"log_every": 10, "save_every": 40, "optimiser": optimiser}
    trainer = Trainer(settings(tmp_path, steps=40, **changes))
    records = list(trainer.run())
    assert records[-1]["total"] < 0.8 * records[0]["total"]


def test_batches_drawn_ahead_are_the_same(tmp_path):
    plain = list(Trainer(settings(tmp_path / "plain", steps=2)).run())
    ahead = list(Trainer(settings(tmp_path / "ahead", steps=2, workers=1)).run())
    assert [record["total"] for record in ahead] == [record["total"] for record in plain]


def test_the_encoder_alone_learns_what_the_objects_are(tmp_path):
    stage = {"steps": 30, "clips": 8, "expressions": 0, "style": "few and large"}
    changes = {
        "stages": [stage],
        "loss": {"objects": 1.0},
        "optimiser": {"muon": True, "learning_rate": 3e-3, "warm_up_steps": 3},
        "log_every": 10,
        "save_every": 30,
    }
    trainer = Trainer(settings(tmp_path, **changes))
    decoder = {k: v.clone() for k, v in trainer.model.mask_decoder.state_dict().items()}
    records = list(trainer.run())
    for name in ("colour", "place", "outline"):
        assert records[-1][name] < 0.95 * records[0][name], name
    assert all(
        torch.equal(v, decoder[k]) for k, v in trainer.model.mask_decoder.state_dict().items()
    )


def test_learning_rate_warms_up_and_decays():
    optimiser = OptimiserSettings(learning_rate=1.0, warm_up_steps=10, final_rate=0.1)
    rates = [learning_rate(step, 110, optimiser) for step in range(111)]
    assert rates[0] == pytest.approx(0.1) and rates[10] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1) and rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_configuration_is_valid(path):
    assert config_from_yaml(TrainingSettings, path).stages
