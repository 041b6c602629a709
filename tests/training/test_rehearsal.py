"""Both stages of the paper at tiny size on several processes, killed and resumed: images, then clips on what came of them."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml

from refsam import RefSAM, RefSAMConfig, checkpoint
from tests.data import fixtures
from tests.test_checkpoint import SAM_SIZES

ROOT = Path(__file__).parents[2]
STEPS = 8


def write_stage(folder: Path, name: str, output: str, start: Path, workers: int = 1) -> Path:
    """The shipped configuration of ViT-B, with the paths and sizes of this rehearsal."""
    content = yaml.safe_load((ROOT / f"configs/{name}_vit_b.yaml").read_text())
    content |= {
        "init_from": str(start),
        "output": str(folder / output),
        "device": "cpu",
        "dtype": "float32",
    }
    content |= {
        "workers": workers,
        "threads": 1,
        "peak_tflops": None,
        "save_every": 2,
        "log_every": 1,
    }
    content |= {"model": {}, "text_cache": str(folder / "text")}
    if "sam" in content:
        content["sam"] = str(folder / "sam")
    for entry in content["data"]["datasets"]:
        entry["root"] = str(folder / Path(entry["root"]).name)
    content["data"]["augmentation"] = {"crop": 0.0, "short_sides": [48], "long_side": 64}
    content["optimiser"]["warm_up_steps"] = 1
    content["stages"] = [content["stages"][0] | {"steps": STEPS, "clips": 1}]
    if "validation" in content:
        content["validation"] |= {"every": STEPS // 2, "clips": 2}
        content["validation"]["dataset"]["root"] = str(folder / "refcoco")
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def kill(launcher: subprocess.Popen[str]) -> None:
    """The launcher and those that it has started, each of which leads a session of its own."""
    started = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # others come and go
            rest = path.read_text().rpartition(")")[2]  # behind the name: state, parent
            if int(rest.split()[1]) == launcher.pid:
                started.append(int(path.parent.name))
    assert started
    launcher.kill()
    for process in started:
        os.kill(process, signal.SIGKILL)


def train(configuration: Path, processes: int, kill_after: int | None = None) -> str:
    """Run it, and return its output; with `kill_after` kill all processes once that step is reported."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
    ]
    program = ["tests.training.waiting", str(kill_after)] if kill_after else ["refsam"]
    command = [*launcher, "-m", *program, "train", str(configuration)]
    with subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if kill_after is not None and line.startswith(f"step {kill_after}/"):
                kill(process)
                break
        said += process.stdout.read()
        code = process.wait(timeout=300)
    assert kill_after is not None or code == 0, said[-4000:]
    return said


def losses(folder: Path) -> list[float]:
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record["total"] for record in records if "total" in record]


def rehearse(folder: Path, processes: int, thorough: bool) -> None:
    """Both stages, the first killed and resumed; `thorough`, the second too, and the first compared with one process."""
    torch.manual_seed(3)
    state = RefSAM(RefSAMConfig.from_dict(SAM_SIZES)).state_dict()
    torch.save({k: v for k, v in state.items() if checkpoint.is_sam(k)}, folder / "sam.pth")
    stored, _ = checkpoint.convert_sam(
        folder / "sam.pth", RefSAM.expected_tensors, {"kind": "small"}
    )
    checkpoint.write_checkpoint(folder / "sam", stored)
    (folder / "refcoco").mkdir()
    fixtures.write_refcoco(folder / "refcoco")
    fixtures.write_ref_youtube_vos(folder / "ref-youtube-vos")
    # A worker of each process costs as much time as the process: here those of the second stage have one.
    images = write_stage(folder, "refcoco", "images", folder / "sam", workers=int(thorough))
    train(images, processes, kill_after=3)
    train(images, processes)
    assert len(losses(folder / "images")) == STEPS
    assert (folder / "images/best/model.safetensors").is_file()
    clips = write_stage(folder, "ref_youtube_vos", "clips", folder / "images/model")
    if thorough:
        train(clips, processes, kill_after=5)
    train(clips, processes)
    assert len(losses(folder / "clips")) == STEPS
    assert checkpoint.read_checkpoint(folder / "clips/model").kind == "delta"
    model = RefSAM.from_pretrained(folder / "clips/model", sam=folder / "sam")
    assert model.config.frozen
    if not thorough:
        return
    # One process that adds up as many batches sees the same.
    content = yaml.safe_load(images.read_text())
    content["output"] = str(folder / "alone")
    content["optimiser"]["gradient_accumulation_steps"] = processes
    alone = folder / "alone.yaml"
    alone.write_text(yaml.safe_dump(content))
    train(alone, 1)
    assert losses(folder / "images") == pytest.approx(losses(folder / "alone"), rel=1e-4)


def test_two_processes(tmp_path: Path) -> None:
    rehearse(tmp_path, 2, thorough=False)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_both_stages_killed(tmp_path: Path, processes: int) -> None:
    rehearse(tmp_path, processes, thorough=True)
