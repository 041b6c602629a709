"""optimize() on segment-anything's `SamAutomaticMaskGenerator`: the same masks, boxes, scores and order."""

import copy
import importlib.util
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from refsam_kernels.integrations import optimize
from refsam_kernels.integrations.segment_anything_generator import run_lengths
from tests.kernels.test_integrations import sam
from tests.timm_modeling import torchvision_to_import

Record = dict[str, Any]


def suppress(boxes: Tensor, scores: Tensor, categories: Tensor, iou_threshold: float) -> Tensor:
    """torchvision's `batched_nms` for one category."""
    kept: list[int] = []
    areas = box_area(boxes)
    for index in scores.argsort(descending=True, stable=True).tolist():
        corners = torch.cat(
            [
                torch.maximum(boxes[index, :2], boxes[kept, :2]),
                torch.minimum(boxes[index, 2:], boxes[kept, 2:]),
            ],
            dim=1,
        )
        sides = (corners[:, 2:] - corners[:, :2]).clamp(min=0)
        inside = sides.prod(dim=1)
        if not (inside / (areas[index] + areas[kept] - inside) > iou_threshold).any():
            kept.append(index)
    return torch.tensor(kept, dtype=torch.int64)


def box_area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)


@pytest.fixture(scope="module")
def generator_class() -> Iterator[type]:
    """The class, with stand-ins for what it takes of torchvision where that is not installed."""
    with pytest.MonkeyPatch.context() as patch:
        with torchvision_to_import():
            from segment_anything import automatic_mask_generator as own
            from segment_anything.utils import transforms
        if not importlib.util.find_spec("torchvision"):
            patch.setattr(transforms, "to_pil_image", Image.fromarray)
            patch.setattr(
                transforms, "resize", lambda image, size: image.resize(size[::-1], Image.BILINEAR)
            )
            patch.setattr(own, "batched_nms", suppress)
            patch.setattr(own, "box_area", box_area)
        yield own.SamAutomaticMaskGenerator


CROPS = {"crop_n_layers": 1, "crop_n_points_downscale_factor": 2}
# For a random model, whose quality is about 0 and whose logits are small.
LOOSE = {"pred_iou_thresh": -1.0, "stability_score_thresh": 0.2, "stability_score_offset": 0.02}
SETTINGS: dict[str, dict[str, Any]] = {
    "as run lengths": LOOSE | {"output_mode": "uncompressed_rle"},
    "as COCO's run lengths": LOOSE | {"output_mode": "coco_rle"},
    "as arrays": LOOSE,
    "crops": LOOSE | CROPS,
    "every mask": {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "box_nms_thresh": 1.0},
    "half by their IoU": LOOSE | {"pred_iou_thresh": 0.05},
    "all too unstable": LOOSE | {"stability_score_thresh": 1.1},
    "none good enough": LOOSE | {"pred_iou_thresh": 9.0},
    "small parts": LOOSE | {"points_per_batch": 3},
}


def make(generator_class: type, **changes: Any) -> Any:
    """On a random model of 32 pixels, whose masks are of (37, 50) pixels."""
    torch.manual_seed(0)
    return generator_class(sam(), **({"points_per_side": 4} | changes))


def image(height: int = 37, width: int = 50) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def assert_same(found: list[Record], wanted: list[Record]) -> None:
    """Masks, boxes and scores equal to the last bit, of the same types and in the same order."""
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        np.testing.assert_equal(ours, theirs)
        types = [{key: type(value) for key, value in each.items()} for each in (ours, theirs)]
        assert types[0] == types[1]
        assert list(map(type, ours["bbox"])) == list(map(type, theirs["bbox"]))


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_all_is_equal_with_the_same_logits(generator_class: type, changes: dict[str, Any]) -> None:
    """With those of an optimized model, of which the original makes masks in its own way."""
    theirs, ours = make(generator_class, **changes), make(generator_class, **changes)
    optimize(theirs.predictor)
    wanted = theirs.generate(image())
    with optimize(ours):
        found = ours.generate(image())
    assert bool(wanted) == (
        changes["stability_score_thresh"] < 1 and changes["pred_iou_thresh"] < 9
    )
    assert_same(found, wanted)


def test_all_is_the_original_model_s(generator_class: type) -> None:
    """Whose logits differ by rounding, so its masks where they are about the threshold."""
    generator = make(generator_class, **SETTINGS["every mask"])
    wanted = generator.generate(image())
    with optimize(generator):
        found = generator.generate(image())
    assert len(found) == len(wanted) > 10
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours["point_coords"] == theirs["point_coords"]
        assert ours["crop_box"] == theirs["crop_box"]
        assert abs(ours["predicted_iou"] - theirs["predicted_iou"]) < 1e-5
        assert (ours["segmentation"] != theirs["segmentation"]).mean() < 1e-3
    assert_same(generator.generate(image()), wanted)
    assert "_process_batch" not in vars(generator)


def test_no_map_of_logits_is_made(generator_class: type) -> None:
    generator = make(generator_class, **LOOSE)
    optimize(generator)
    generator.predictor.model.postprocess_masks = None  # not to be called
    assert generator.generate(image())


def test_copies_and_pickles_generate(generator_class: type) -> None:
    generator = make(generator_class, **LOOSE)
    optimize(generator)
    wanted = generator.generate(image())
    for twin in (copy.deepcopy(generator), pickle.loads(pickle.dumps(generator))):
        assert_same(twin.generate(image()), wanted)


def test_what_a_sub_class_makes_itself_stays(generator_class: type) -> None:
    class Own(generator_class):  # type: ignore[misc]
        def _process_batch(self, points: Any, im_size: Any, crop_box: Any, orig_size: Any) -> Any:
            batches.append(len(points))
            return super()._process_batch(points, im_size, crop_box, orig_size)

    batches: list[int] = []
    generator = Own(sam(), points_per_side=4, **LOOSE)
    with optimize(generator):
        generator.generate(image())
    assert batches == [16]


def test_an_offset_below_zero_is_the_class_s_own(generator_class: type) -> None:
    changes = LOOSE | {"stability_score_offset": -0.02}
    theirs, ours = make(generator_class, **changes), make(generator_class, **changes)
    optimize(theirs.predictor)
    optimize(ours)
    assert_same(ours.generate(image()), theirs.generate(image()))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_run_lengths_of_a_crop(data: st.DataObject) -> None:
    height, width = data.draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    bottom, right = data.draw(st.integers(top + 1, height)), data.draw(st.integers(left + 1, width))
    values = data.draw(st.lists(st.booleans(), min_size=49, max_size=49))
    crop = torch.tensor(values).view(7, 7)[: bottom - top, : right - left]
    mask = torch.zeros(height, width, dtype=torch.bool)
    mask[top:bottom, left:right] = crop
    flat = torch.cat([torch.zeros(1), crop.T.flatten()])
    found = run_lengths(
        flat.diff().nonzero().flatten(), [left, top, right, bottom], (height, width)
    )
    assert found["size"] == [height, width]
    parts = [torch.full((n,), bool(i % 2)) for i, n in enumerate(found["counts"])]
    assert torch.equal(torch.cat(parts), mask.T.flatten())
    assert all(found["counts"][1:])  # only the first run may be empty
