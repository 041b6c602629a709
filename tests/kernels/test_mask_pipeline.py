"""transformers' pipeline("mask-generation") with an optimized SAM: the same masks and scores."""

import importlib.util
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from refsam_kernels.integrations import optimize
from tests.kernels.test_integrations import calls_of, transformers_encoder
from tests.kernels.test_mask_generator import suppress

SIDE = 32
OPTIONS = {"points_per_batch": 8, "points_per_crop": 4, "crops_nms_thresh": 1.0}
LOOSE = {"pred_iou_thresh": -10.0, "stability_score_thresh": 0.0}


@pytest.fixture
def image_processor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """That of PIL; where torchvision is not installed, a stand-in for the one function of it that is called."""
    module = pytest.importorskip("transformers.models.sam.image_processing_pil_sam")
    kind = module.SamImageProcessorPil
    if not importlib.util.find_spec("torchvision"):
        boxes = ModuleType("torchvision.ops.boxes")
        monkeypatch.setattr(
            boxes,
            "batched_nms",
            lambda boxes, scores, idxs, iou_threshold: suppress(boxes, scores, idxs, iou_threshold),
            raising=False,
        )
        for name in ("torchvision", "torchvision.ops"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, "torchvision.ops.boxes", boxes)
        suppressed = lambda self, *args: module._post_process_for_mask_generation(*args)  # noqa: E731
        kind = type(kind.__name__, (kind,), {"post_process_for_mask_generation": suppressed})
    square = {"height": SIDE, "width": SIDE}
    quarter = {"height": SIDE // 4, "width": SIDE // 4}
    return kind(
        size={"longest_edge": SIDE}, pad_size=square, mask_size={"longest_edge": SIDE // 4}, mask_pad_size=quarter
    )  # fmt: skip


def test_masks_are_the_original_ones(image_processor: Any) -> None:
    from transformers.pipelines.mask_generation import MaskGenerationPipeline

    model = transformers_encoder(grid=SIDE // 4, model="SamModel")
    pipeline = MaskGenerationPipeline(model=model, image_processor=image_processor)
    pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    wanted = pipeline(image, **OPTIONS, **LOOSE)
    optimize(model)
    optimize(image_processor)
    found: dict[str, Any] = {}
    calls = calls_of(lambda: found.update(pipeline(image, **OPTIONS, **LOOSE)))
    assert calls == {"rel_pos_attention": 2, "token_image_attention": 8, "mask_upscale": 2}
    assert len(found["masks"]) == len(wanted["masks"]) > 1
    assert all(
        np.array_equal(ours, theirs)
        for ours, theirs in zip(found["masks"], wanted["masks"], strict=True)
    )
    torch.testing.assert_close(found["scores"], wanted["scores"], rtol=1e-4, atol=1e-5)
