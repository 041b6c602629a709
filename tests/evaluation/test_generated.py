"""The frozen benchmark of generated clips, and how it is scored."""

import json
from importlib.resources import files

import numpy as np
import pytest
import torch

from refsam.data.generated.backgrounds import photographs
from refsam.data.generated.clips import sample_clip
from refsam.errors import UserError
from refsam.evaluation.runners import generated
from refsam.session import FrameResult


@pytest.fixture(scope="module")
def frozen() -> list[dict]:
    text = (
        files("refsam.evaluation.runners").joinpath("generated_v1.json").read_text(encoding="utf-8")
    )
    return json.loads(text)["clips"]


class Oracle:
    """Stands for a session whose model knows the truth, or marks nothing, or everything."""

    def __init__(self, masks: torch.Tensor) -> None:
        self.masks, self.frame = masks, 0

    def step(self, frame: torch.Tensor) -> FrameResult:
        masks = self.masks[:, self.frame].numpy()
        self.frame += 1
        return FrameResult(self.frame - 1, masks, np.zeros((2, 4, 4), np.float32), np.ones(2))


def test_the_benchmark_is_large_and_hard_enough(frozen):
    assert len(frozen) >= 200 and generated.FRAMES >= 24
    count, shared = len(photographs(held_out=True)), 0
    for index, clip in enumerate(frozen):
        arguments = generated.benchmark_arguments(index)
        scene, expressions = sample_clip(photographs=count, **arguments)
        assert [[each.kind, each.text] for each in expressions] == clip["sentences"]
        (target,) = expressions[0].targets
        item = scene.objects[target]
        assert 0.005 <= item.area <= 0.1
        others = [other for i, other in enumerate(scene.objects) if i != target]
        shared += any(
            other.colour_index == item.colour_index
            or (item.shape_index is not None and other.shape_index == item.shape_index)
            for other in others
        )
    assert shared >= len(frozen) / 2


@pytest.mark.parametrize("index", [0, 7])
def test_drawn_clips_are_the_frozen_ones(frozen, index):
    drawn = generated._describe(generated.benchmark_clip(index))
    generated._check_frozen(index, drawn, frozen[index])
    drawn["area"][0] *= 2
    with pytest.raises(UserError, match="not the one that was frozen"):
        generated._check_frozen(index, drawn, frozen[index])


@pytest.mark.parametrize(
    ("answer", "region", "false_area"),
    [("truth", 1.0, 0.0), ("nothing", 0.0, 0.0), ("all", None, 1.0)],
)
def test_scores_of_known_answers(monkeypatch, answer, region, false_area):
    def session(_model, _expressions):
        masks = {
            "truth": clip.masks,
            "nothing": torch.zeros_like(clip.masks),
            "all": torch.ones_like(clip.masks),
        }
        return Oracle(masks[answer])

    clip = generated.benchmark_clip(0)
    monkeypatch.setattr(generated, "VideoSession", session)
    present, absent = generated._score_clip(0, clip, model=None)
    expected = float(clip.masks[0].float().mean()) if region is None else region
    assert present.region == pytest.approx(expected, abs=1e-3)
    assert absent.region is None and absent.false_area == false_area
    summary = generated.summarise([present, absent])
    assert summary["false_area"] == false_area
    assert summary["accuracy"]["everything"]["J"] == present.region
    assert "| colour | 1 |" in generated.table(summary)
