"""Training learns what it is shown, with any backend."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from refsam.metrics import region_similarity
from refsam.model import RefSAM
from refsam.session import VideoSession
from refsam.training.loop import Trainer
from refsam_kernels import use_backend
from tests.data import fixtures
from tests.training.runs import run_settings

ROOT = Path(__file__).parents[2]
STEPS = 6


def curve(folder: Path, name: str, steps: int) -> list[float]:
    """Losses of a run on clips of two frames, then the gradients' norms."""
    optimiser = {"learning_rate": 3e-3, "warm_up_steps": 0, "final_rate": 1.0}
    trainer = Trainer(run_settings(folder, name, steps=steps, optimiser=optimiser, validation={}))
    records = list(trainer.run())
    return [record[key] for key in ("total", "gradient_norm") for record in records]


def test_fast_backends_learn_as_the_formulas_do(tmp_path: Path) -> None:
    fixtures.write_ref_youtube_vos(tmp_path / "videos")
    with use_backend("reference"):
        expected = curve(tmp_path, "reference", STEPS)
    automatic = curve(tmp_path, "automatic", STEPS)
    assert automatic == pytest.approx(expected, rel=1e-3)
    assert automatic != expected, "other roundings: other backends ran"
    assert min(automatic[STEPS - 5 : STEPS]) < automatic[0]


@pytest.mark.slow
def test_triton_kernels_learn_as_the_formulas_do(tmp_path: Path) -> None:
    """In Triton's interpreter, in a process of its own."""
    pytest.importorskip("triton")
    fixtures.write_ref_youtube_vos(tmp_path / "videos")
    with use_backend("reference"):
        expected = curve(tmp_path, "reference", STEPS)
    environment = {"TRITON_INTERPRET": "1", "REFSAM_BACKEND": "triton", "OMP_NUM_THREADS": "1"}
    code = (
        "import json, sys; from pathlib import Path; from tests.training.test_learning import curve; "
        f"print(json.dumps(curve(Path(sys.argv[1]), 'triton', {STEPS})))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert json.loads(result.stdout.splitlines()[-1]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_one_clip_is_learnt_by_heart(tmp_path: Path) -> None:
    """J above 0.95 on the clip that is trained on, frame by frame, online."""
    fixtures.write_ref_youtube_vos(tmp_path / "videos")
    listing = tmp_path / "videos/meta_expressions/train/meta_expressions.json"
    content = json.loads(listing.read_text())
    content["videos"] = dict(list(content["videos"].items())[1:])  # the video of one object
    listing.write_text(json.dumps(content))
    trainer = Trainer(
        run_settings(
            tmp_path,
            "run",
            steps=400,
            loss={"focal": 6.0, "dice": 1.0},
            optimiser={"learning_rate": 3e-3, "warm_up_steps": 20, "ema_decay": 0.9},
            data={
                "datasets": [{"name": "ref-youtube-vos", "root": str(tmp_path / "videos")}],
                "augmentation": {"crop": 0.0, "flip": 0.0, "short_sides": [48], "long_side": 96},
            },
            validation={},
            log_every=50,
            save_every=400,
        )
    )
    list(trainer.run())
    (dataset,) = trainer.datasets
    (video,) = dataset.videos
    expression = dataset.expressions(video.name)[0]
    averaged = RefSAM.from_checkpoint(trainer.weights.averaged_checkpoint(delta=False))
    session = VideoSession(averaged, [expression.text])
    for name in video.annotated:
        found = session.step(torch.from_numpy(dataset.frame(video.name, name).copy())).masks[0]
        assert region_similarity(found.numpy(), dataset.mask(expression, name)) > 0.95, name
