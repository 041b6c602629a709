"""Small runs on a dataset, for the tests of training."""

from pathlib import Path

import torch

from refsam.config import config_from_dict
from refsam.model.text_encoder import CachedTextEncoder, EncodedText
from refsam.training.loop import Trainer
from refsam.training.settings import TrainingSettings
from tests.tiny_model import CONFIG


def run_settings(
    folder: Path, name: str, steps: int = 4, clips: int = 1, **changes: object
) -> TrainingSettings:
    """Settings of a run on the dataset in `folder/videos`, written to `folder/name`.

    Frames are of one size, so that padding differs in no batch; the learning rate does not depend on the number of steps.
    """
    values: dict[str, object] = {
        "model": CONFIG,
        "output": str(folder / name),
        "data": {
            "datasets": [{"name": "ref-youtube-vos", "root": str(folder / "videos")}],
            "augmentation": {"crop": 0.0, "short_sides": [48], "long_side": 96},
        },
        "stages": [{"steps": steps, "clips": clips, "frames": 2, "expressions": 2}],
        "loss": {"focal": 1.0, "dice": 1.0, "iou": 0.5},
        "optimiser": {"learning_rate": 1e-3, "warm_up_steps": 0, "final_rate": 1.0},
        "validation": {"every": 4, "clips": 1, "frames": 2, "dataset": None},
        "threads": 1,
        "save_every": 2,
        "log_every": 1,
    }
    return config_from_dict(TrainingSettings, values | changes)


def losses_of(trainer: Trainer) -> list[float]:
    """Run to the end; the total loss of every step."""
    return [record["total"] for record in trainer.run() if "total" in record]


def ones_for_words(encoder: CachedTextEncoder, expressions: list[str]) -> EncodedText:
    """Stand for the features of a pretrained encoder: ones, as many as an expression has words."""
    lengths = torch.tensor([len(text.split()) for text in expressions])
    return EncodedText(torch.ones(len(expressions), int(lengths.max()), encoder.width), lengths)
