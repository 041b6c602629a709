"""The trainer: learns, resumes exactly, keeps what it had when something goes wrong."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from refsam.config import config_from_dict
from refsam.errors import ConfigError, UserError
from refsam.model import RefSAM
from refsam.training.loop import Trainer
from refsam.training.optim import learning_rate
from refsam.training.settings import OptimiserSettings, TrainingSettings
from tests.data import fixtures

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


@dataclass(frozen=True)
class Finished:
    """A run of four steps that came to its end: its folder, which nobody may change, records and weights."""

    folder: Path
    records: list
    weights: dict

    @property
    def losses(self) -> list[float]:
        return [record["total"] for record in self.records]

    def copy(self, folder: Path) -> None:
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    trainer = Trainer(settings(folder))
    records = list(trainer.run())
    return Finished(folder, records, trainer.model.state_dict())


def test_a_run_writes_a_log_and_a_model_that_loads(finished):
    assert [record["step"] for record in finished.records] == [1, 2, 3, 4]
    lines = (finished.folder / "log.jsonl").read_text().splitlines()
    steps = [line["step"] for line in map(json.loads, lines) if "total" in line]
    assert steps == [1, 2, 3, 4]
    model = RefSAM.from_pretrained(str(finished.folder / "model"))
    assert model.config.image_encoder.image_size == 64
    model.encode_text(["the red circle"])


def test_a_killed_run_resumes_to_the_same_weights(tmp_path, finished):
    first = Trainer(settings(tmp_path / "cut"))
    for index, _ in enumerate(first.run()):
        if index == 2:  # killed after the third step: the state of step 2 is on disk
            break
    second = Trainer(settings(tmp_path / "cut"))
    assert [record["total"] for record in second.run()] == finished.losses[2:]
    for name, value in finished.weights.items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut_off, flip_a_bit])
def test_a_damaged_state_falls_back_to_the_one_before(tmp_path, finished, damage):
    finished.copy(tmp_path)
    damage(tmp_path / "state.safetensors")
    said: list[str] = []
    again = [record["total"] for record in Trainer(settings(tmp_path), said.append).run()]
    assert again == finished.losses[2:]
    assert "state.safetensors is damaged" in said[0]
    assert said[1] == "state: going on from step 2"
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["total"] for line in lines if "total" in line] == finished.losses
    assert any("is damaged" in text for line in lines for text in line.get("state", []))


def test_without_a_whole_state_nothing_begins_anew(tmp_path, finished):
    finished.copy(tmp_path)
    for name in ("state.safetensors", "state.previous.safetensors"):
        cut_off(tmp_path / name)
    with pytest.raises(UserError, match=r"state\.safetensors is damaged .*state\.previous.*remove"):
        next(Trainer(settings(tmp_path)).run())


def test_a_state_of_another_model_is_refused(tmp_path, finished):
    finished.copy(tmp_path)
    wider = settings(tmp_path, model=TINY | {"cross_modal_layers": 2})
    with pytest.raises(UserError, match=r"of another model \(.*cross_modal_mlp.* take another"):
        next(Trainer(wider).run())


def test_a_state_of_an_earlier_version_is_refused(tmp_path):
    (tmp_path / "state.pt").write_bytes(b"")
    with pytest.raises(UserError, match="earlier version"):
        next(Trainer(settings(tmp_path)).run())


def test_means_of_the_log_survive_a_kill_between_its_lines(tmp_path):
    """The state is saved after steps that no line of the log holds yet."""
    changes = {"steps": 6, "log_every": 3, "save_every": 2}
    whole = [record["total"] for record in Trainer(settings(tmp_path / "whole", **changes)).run()]
    next(Trainer(settings(tmp_path / "cut", **changes)).run())  # killed after step 3, before 4
    assert [r["total"] for r in Trainer(settings(tmp_path / "cut", **changes)).run()] == whole


def test_a_loss_that_is_no_number_stops_and_keeps_the_state(tmp_path):
    trainer = Trainer(settings(tmp_path))
    steps = iter(trainer.run())
    next(steps), next(steps)
    with torch.no_grad():
        trainer.model.cross_modal_mlp.requires_grad_(True)
        next(trainer.model.cross_modal_mlp.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match=r"not a number at step 2 .*state of step 2 is kept"):
        next(steps)
    assert (tmp_path / "state.safetensors").exists()


def test_loss_falls_on_generated_clips(tmp_path):
    optimiser = {"learning_rate": 3e-3, "warm_up_steps": 3}
    changes = {"log_every": 5, "save_every": 40, "optimiser": optimiser}
    trainer = Trainer(settings(tmp_path, steps=20, **changes))
    records = list(trainer.run())
    assert records[-1]["total"] < 0.8 * records[0]["total"]


def test_batches_drawn_ahead_are_the_same(tmp_path):
    plain = list(Trainer(settings(tmp_path / "plain", steps=2)).run())
    ahead = list(Trainer(settings(tmp_path / "ahead", steps=2, workers=1)).run())
    assert [record["total"] for record in ahead] == [record["total"] for record in plain]


def test_the_encoder_alone_learns_what_the_objects_are(tmp_path):
    stage = {"steps": 40, "clips": 4, "expressions": 0, "style": "few and large"}
    changes = {
        "stages": [stage],
        "loss": {"objects": 1.0},
        "optimiser": {"muon": True, "learning_rate": 3e-3, "warm_up_steps": 3},
        "log_every": 10,
        "save_every": 40,
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
    assert TrainingSettings.from_yaml(path).stages


def test_gradients_that_are_no_number_stop_before_the_weights_do(tmp_path):
    trainer = Trainer(settings(tmp_path))
    weight = trainer.model.cross_modal_mlp.get_parameter("layers.0.weight")
    weight.register_hook(lambda gradient: torch.full_like(gradient, torch.nan))
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(UserError, match=r"the gradient is not a number at step 0 .*no state was"):
        next(trainer.run())
    assert all(torch.equal(value, before[n]) for n, value in trainer.model.state_dict().items())


def test_accumulated_batches_are_one_larger_batch(tmp_path):
    """Clips are numbered on through the batches of a step."""
    fixtures.write_ref_youtube_vos(tmp_path / "videos")
    data = {"datasets": [{"name": "ref-youtube-vos", "root": str(tmp_path / "videos")}]}
    data["augmentation"] = {"crop": 0.0, "short_sides": [48], "long_side": 96}

    def losses(name: str, clips: int, steps: int) -> list[float]:
        stage = {"steps": 3, "clips": clips, "frames": 2, "expressions": 1}
        optimiser = {"gradient_accumulation_steps": steps}
        changes = {"stages": [stage], "optimiser": optimiser, "data": data}
        return [r["total"] for r in Trainer(settings(tmp_path / name, **changes)).run()]

    assert losses("two", 1, 2) == pytest.approx(losses("one", 2, 1), rel=1e-5)


def test_gradients_reach_back_through_so_many_track_tokens(tmp_path):
    """The tracking module learns from a second frame's loss only if its token is not cut off there."""
    trainer = Trainer(settings(tmp_path))
    stage = trainer.settings.stages[0]
    batch = next(trainer._batches())
    for tbptt_frames, is_taught in ((None, True), (2, True), (1, False)):
        trainer.module.zero_grad(set_to_none=True)
        trainer.module(batch, replace(stage, tbptt_frames=tbptt_frames))["total"].backward()
        gradients = [parameter.grad for parameter in trainer.model.tracking.parameters()]
        assert any(g is not None and g.any() for g in gradients) == is_taught


def test_without_a_running_average_the_weights_are_saved(tmp_path):
    trainer = Trainer(settings(tmp_path, optimiser={"ema_decay": None}))
    list(trainer.run())
    saved = RefSAM.from_pretrained(str(tmp_path / "model")).state_dict()
    assert all(torch.equal(saved[n], value) for n, value in trainer.model.state_dict().items())


def test_recomputed_blocks_give_the_same_losses(tmp_path, finished):
    trainer = Trainer(settings(tmp_path, activation_checkpointing=True))
    assert [record["total"] for record in trainer.run()] == finished.losses


@pytest.mark.slow
def test_a_compiled_encoder_gives_the_same_losses(tmp_path):
    plain = [r["total"] for r in Trainer(settings(tmp_path / "plain")).run()]
    compiled = [r["total"] for r in Trainer(settings(tmp_path / "compiled", compile=True)).run()]
    assert compiled == pytest.approx(plain, rel=1e-4)


def test_all_mistakes_of_a_configuration_are_told_at_once(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(
        "model: {preset: nano, image_encoder: {depht: 2}}\n"
        "output: runs/x\n"
        "stages: [{steps: many, clips: 2}]\n"
        "optimizer: {}\n"
        "validation: {evry: 10}\n"
    )
    with pytest.raises(ConfigError) as error:
        TrainingSettings.from_yaml(path)
    for part in ("image_encoder.depht", "stages.0.steps", "optimizer", "validation.evry"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_a_preset_takes_changes():
    values = {"model": {"preset": "vit_b", "text_encoder": {"kind": "small"}}}
    values |= {"output": "x", "stages": [{"steps": 1, "clips": 1}]}
    config = config_from_dict(TrainingSettings, values).architecture
    assert config.text_encoder.kind == "small" and config.image_encoder.embed_dim == 768
