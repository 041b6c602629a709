"""Faults that once lost a run or changed it silently: new configurations, failed workers, full disks, bad files, two writers."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from refsam import RefSAM, RefSAMConfig
from refsam.cli.train import app
from refsam.config import config_to_dict
from refsam.errors import ConfigError, UserError
from refsam.runtime.files import only_writer
from refsam.runtime.signals import StopRequest
from refsam.training.batches import DatasetStream, batches
from refsam.training.configuration import keep_batches
from refsam.training.distributed import Processes
from refsam.training.loop import Trainer
from refsam.training.state import Progress
from tests.data import fixtures
from tests.test_checkpoint import SAM_SIZES
from tests.training.runs import losses_of, run_settings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    fixtures.write_ref_youtube_vos(tmp_path / "videos")
    return tmp_path


def _stop_after_the_state_of_step_2(steps: Generator) -> None:
    next(steps), next(steps), next(steps)
    steps.close()


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run `run` that was stopped after the state of step 2, beside its videos: to be copied."""
    folder = tmp_path_factory.mktemp("begun")
    fixtures.write_ref_youtube_vos(folder / "videos")
    _stop_after_the_state_of_step_2(Trainer(run_settings(folder, "run")).run())
    return folder


@pytest.fixture
def stopped(begun: Path, tmp_path: Path) -> Path:
    """A copy of that run's folder, beside the same videos."""
    return Path(shutil.copytree(begun / "run", begun / tmp_path.name))


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def optimiser(**changes: object) -> dict:
    return {"learning_rate": 1e-3, "warm_up_steps": 0, "final_rate": 1.0, **changes}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"optimiser": optimiser(learning_rate=2e-3)}, "optimiser.learning_rate was 0.001"),
        ({"loss": {"focal": 2.0, "dice": 1.0, "iou": 0.5}}, "loss.focal was 1.0, now 2.0"),
        ({"clips": 2}, "stages.0.clips was 1, now 2"),
        ({"steps": 3}, "stages.0.steps was 4, now 3"),
        ({"dtype": "bfloat16"}, "dtype was float32"),
    ],
)
def test_another_configuration_is_refused_with_a_list(
    stopped: Path, changes: dict, named: str
) -> None:
    changed = run_settings(stopped.parent, stopped.name, **changes)
    with pytest.raises(UserError, match="holds a run with another configuration") as error:
        next(Trainer(changed).run())
    assert named in str(error.value) and "--allow-changes" in str(error.value)
    if "steps" in changes or "dtype" in changes:
        return
    said: list[str] = []
    next(Trainer(changed, said.append, allow_changes=True).run())
    assert any(named in text for text in said)
    assert any(named in text for row in log_of(stopped) for text in row.get("state", []))


def test_what_changes_nothing_may_change(stopped: Path) -> None:
    changed = run_settings(
        stopped.parent, stopped.name, steps=6, save_every=1, log_every=2, workers=1
    )
    assert [record["step"] for record in Trainer(changed).run() if "total" in record] == [4, 6]


def test_a_state_of_four_batches_goes_on_with_the_same_batches(folder: Path) -> None:
    """A run of two processes of two batches each, as its state tells, in one process."""
    settings = run_settings(folder, "run", optimiser=optimiser(gradient_accumulation_steps=4))
    whole = losses_of(Trainer(settings))
    steps = Trainer(
        run_settings(folder, "cut", optimiser=optimiser(gradient_accumulation_steps=4))
    ).run()
    _stop_after_the_state_of_step_2(steps)
    shared = run_settings(folder, "cut", optimiser=optimiser(gradient_accumulation_steps=2))
    trainer = Trainer(shared, allow_changes=False)
    from refsam.training.state import read_state, write_state

    tensors, progress, before, _ = read_state(folder / "cut")
    progress.processes = 2
    before["optimiser.gradient_accumulation_steps"] = 2
    write_state(folder / "cut", tensors, progress, before)
    said: list[str] = []
    trainer.say = said.append
    assert losses_of(trainer) == whole[2:]
    assert any("2 processes before, now 1: a step is 4 batches, 4 on each" in text for text in said)


def test_a_number_of_processes_that_cannot_share_the_batches(folder: Path) -> None:
    settings = run_settings(folder, "run")
    before, now = Progress(processes=3, batches=3), Progress(processes=2)
    with pytest.raises(UserError, match="which 2 cannot share evenly"):
        keep_batches(before, now, {}, settings, allow_changes=False)
    assert keep_batches(before, now, {}, settings, allow_changes=True)[0] == 1


def test_two_runs_do_not_write_one_folder(folder: Path) -> None:
    code = (
        "from pathlib import Path; from refsam.runtime.files import only_writer; import sys, time\n"
        f"with only_writer(Path({str(folder / 'run' / 'run')!r}), wait=False): print('held', flush=True); time.sleep(600)"
    )
    (folder / "run").mkdir()
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="is being written by another process"):
            next(Trainer(run_settings(folder, "run")).run())
        other.kill()
    next(Trainer(run_settings(folder, "run")).run())  # let go of with its holder


@pytest.mark.parametrize(
    "variables",
    [
        {"RANK": "0", "WORLD_SIZE": "2"},
        {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"},
    ],
)
def test_processes_that_cannot_find_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        UserError, match=r"processes were started by \w+ and cannot find each other"
    ):
        Processes.join("cpu")


def test_a_task_alone_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": "8",
        "RANK": "0",
        "WORLD_SIZE": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert Processes.join("cpu").count == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "gpu"])
def test_a_device_that_is_not_there(folder: Path, device: str) -> None:
    with pytest.raises(UserError, match="device: got"):
        Trainer(run_settings(folder, "run", device=device))


def test_workers_send_their_batches_without_shared_memory(folder: Path) -> None:
    settings = run_settings(folder, "run")
    trainer = Trainer(settings)
    stream = DatasetStream(settings, trainer.datasets)
    before = set(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else set()
    arriving = batches(stream, 0, 3, workers=1)
    first = next(arriving)
    assert isinstance(first.clips.frames, torch.Tensor)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert "/torch_" not in maps.read_text()
    assert not [name for name in set(os.listdir("/dev/shm")) - before if name.startswith("torch_")]
    (alone,) = batches(stream, 0, 1, workers=0)
    assert torch.equal(first.clips.frames, alone.clips.frames)
    assert torch.equal(first.clips.masks, alone.clips.masks)


class _Dying(torch.utils.data.Dataset):
    batches = 1

    def __getitem__(self, index: int) -> object:
        os.kill(os.getpid(), signal.SIGKILL)
        return None


class _Stuck(torch.utils.data.Dataset):
    """After the first one no batch comes."""

    batches = 1

    def __getitem__(self, index: int) -> object:
        if index:
            time.sleep(600)
        return None


def test_a_killed_worker_ends_the_run_in_one_line() -> None:
    with pytest.raises(UserError, match="workers: one that draws batches was ended"):
        next(batches(_Dying(), 0, 1, workers=1))


def test_a_signal_ends_a_run_whose_data_do_not_come(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("refsam.training.loop._PATIENCE_SECONDS", 0.2)
    trainer = Trainer(run_settings(folder, "run", workers=1))
    steps = trainer.run()
    next(steps)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    others = set(multiprocessing.active_children())
    trainer._stuck = batches(_Stuck(), 0, 2, workers=1)
    next(trainer._stuck)  # it has been started, which may take longer than the patience
    monkeypatch.setattr(
        trainer, "train_step", lambda arriving, request: _wait_and_signal(trainer, request)
    )
    assert list(steps) == [] and trainer.stopped_by == signal.SIGTERM and trainer.saved_step == 1
    for worker in set(multiprocessing.active_children()) - others:
        worker.join(300)  # as this process does at its end
        assert not worker.is_alive()


def _wait_and_signal(trainer: Trainer, request: StopRequest) -> int:
    os.kill(os.getpid(), signal.SIGTERM)
    with request.waiting(0.2):
        next(trainer._stuck)
    return 0


def test_sigusr1_saves_after_the_step(folder: Path) -> None:
    trainer = Trainer(run_settings(folder, "run", steps=3, save_every=100))
    steps = trainer.run()
    next(steps)
    assert trainer.saved_step is None
    os.kill(os.getpid(), signal.SIGUSR1)
    next(steps), next(steps)
    assert trainer.saved_step is not None and trainer.saved_step < 3


def test_a_full_disk_keeps_the_state_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(run_settings(folder, "run", save_every=1))
    steps = trainer.run()
    next(steps), next(steps)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("refsam.training.state.save_file", full)
    with pytest.raises(UserError, match=r"step 2 cannot be written .*No space.*step 1 is kept"):
        list(steps)
    monkeypatch.undo()
    assert next(Trainer(run_settings(folder, "run", save_every=1)).run())["step"] == 2


def spoil_validation(folder: Path) -> dict:
    root = fixtures.write_ref_youtube_vos_truth(folder / "videos")
    frame = root / "valid/JPEGImages/0062f68aaa/00000.jpg"
    frame.write_bytes(frame.read_bytes()[:300])
    dataset = {"name": "ref-youtube-vos", "root": str(root), "split": "valid"}
    return {"every": 2, "clips": 3, "frames": 2, "dataset": dataset}


def test_the_state_is_saved_before_validation_fails(folder: Path) -> None:
    validation = spoil_validation(folder)
    settings = run_settings(folder, "run", save_every=100, validation=validation)
    with pytest.raises(UserError, match=r"00000\.jpg"):
        list(Trainer(settings).run())
    mended = run_settings(folder, "run", save_every=100)
    assert next(Trainer(mended).run())["step"] == 3  # step 2 is not done again


def test_unreadable_files_may_be_skipped_in_validation(folder: Path) -> None:
    validation = spoil_validation(folder)
    data = config_to_dict(run_settings(folder, "run").data) | {"unreadable": "skip"}
    settings = run_settings(folder, "run", validation=validation, data=data)
    with pytest.raises(UserError, match="none of its clips can be read"):
        list(Trainer(settings).run())
    skipped = [text for row in log_of(folder / "run") for text in row.get("skipped", [])]
    assert any("00000.jpg" in text for text in skipped)


def test_expressions_that_cannot_be_trained_on_are_named_at_the_start(folder: Path) -> None:
    path = folder / "videos/meta_expressions/train/meta_expressions.json"
    content = json.loads(path.read_text())
    content["videos"]["0062f687f1"]["expressions"]["1"]["exp"] = " "
    content["videos"]["00a23ccf53"]["expressions"]["0"]["exp"] = "the ..."
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="2 expressions cannot be trained on") as error:
        Trainer(run_settings(folder, "run"))
    assert "0062f687f1/1" in str(error.value) and "00a23ccf53/0" in str(error.value)


def test_a_new_word_on_resume_is_told_in_words(folder: Path) -> None:
    steps = Trainer(run_settings(folder, "run")).run()
    _stop_after_the_state_of_step_2(steps)
    path = folder / "videos/meta_expressions/train/meta_expressions.json"
    path.write_text(path.read_text().replace("a blue box", "a blue zeppelin"))
    with pytest.raises(
        UserError, match="the expressions have other words than when the run was begun"
    ):
        next(Trainer(run_settings(folder, "run")).run())


@pytest.fixture
def start(folder: Path) -> Path:
    torch.manual_seed(0)
    config = RefSAMConfig.from_dict(SAM_SIZES | {"frozen": False})
    RefSAM(config).save_pretrained(folder / "start")
    return folder / "start"


def test_entries_of_model_are_put_over_the_start(folder: Path, start: Path) -> None:
    changes = {
        "init_from": str(start),
        "model": {"frozen": True, "image_encoder": {"image_size": 96}},
    }
    trainer = Trainer(run_settings(folder, "run", **changes))
    assert trainer.model.config.frozen and trainer.model.image_size == 96
    assert not trainer.model.image_encoder.blocks[0].attn.qkv.weight.requires_grad
    untouched = Trainer(run_settings(folder, "other", init_from=str(start), model={}))
    assert untouched.model.config == RefSAM.from_pretrained(start).config


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"preset": "vit_b"}, "got the preset vit_b"),
        ({"prompt_dim": 128}, "model: prompt_dim cannot be changed"),
        ({"speed": 3}, "speed: unknown key"),
    ],
)
def test_entries_of_model_that_contradict_the_start(
    folder: Path, start: Path, model: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        Trainer(run_settings(folder, "run", init_from=str(start), model=model))


def test_the_best_models_are_kept_and_a_run_that_gets_no_better_ends(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.3, 0.5, 0.4, 0.2, 0.1])
    monkeypatch.setattr(
        "refsam.training.validator.score_clips", lambda *_: [((score := next(scores)), score)]
    )
    validation = {"every": 1, "clips": 1, "frames": 1, "keep": 2, "patience": 3}
    trainer = Trainer(run_settings(folder, "run", steps=9, validation=validation))
    records = [record["step"] for record in trainer.run() if "J&F" in record]
    assert records == [1, 2, 3, 4, 5] and trainer.progress.best_step == 2
    assert sorted(path.name for path in (folder / "run/top").iterdir()) == ["000002", "000003"]
    assert any(
        "no better score" in row["stopped"][0] for row in log_of(folder / "run") if "stopped" in row
    )
    assert (folder / "run/model/config.json").is_file()


def test_the_log_tells_passes_clips_and_what_is_left(folder: Path) -> None:
    record = next(Trainer(run_settings(folder, "run", clips=2)).run())
    assert record["samples"] == 2 and record["epoch"] == pytest.approx(2 / 12)
    assert record["hours_left"] == pytest.approx(3 * record["seconds_per_step"] / 3600)


def test_rates_are_scaled_to_the_batch_if_asked(folder: Path) -> None:
    settings = run_settings(folder, "run", clips=2, optimiser=optimiser(lr_batch=8))
    said: list[str] = []
    trainer = Trainer(settings, said.append)
    assert next(trainer.run())["learning_rate"] == pytest.approx(1e-3 * 2 / 8)
    assert said == [
        "batch: 2 clips a step: 2 on each of 1 processes, 1 accumulated; "
        "learning rate 0.00025, scaled for that from 0.001 for 8"
    ]


def test_the_command_waits_passively_and_allows_changes(folder: Path) -> None:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config_to_dict(run_settings(folder, "run", steps=2))))
    assert CliRunner().invoke(app, [str(path), "stages.0=1"]).exit_code != 0
    assert CliRunner().invoke(app, [str(path)]).exit_code == 0
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    refused = CliRunner().invoke(app, [str(path), "seed=3"])
    assert isinstance(refused.exception, UserError) and "seed was 0" in str(refused.exception)
    assert CliRunner().invoke(app, [str(path), "seed=3", "--allow-changes"]).exit_code == 0


def test_a_lock_is_let_go_of(tmp_path: Path) -> None:
    again = {"wait": False, "again": True}
    with only_writer(tmp_path / "a", **again), only_writer(tmp_path / "a", **again):
        pass
    with only_writer(tmp_path / "a", wait=False):
        pass
