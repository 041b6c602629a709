"""Frames on their way to a GPU. Imports what a machine with a GPU has, so not PyAV."""

import pytest
import torch

from refsam.session import FramePreparer
from tests.tiny_model import tiny_model


@pytest.mark.gpu
def test_uploads_on_a_gpu_arrive_whole() -> None:
    model = tiny_model().to("cuda")
    prepare, source = FramePreparer(model), torch.Generator().manual_seed(0)
    frames = [
        torch.randint(256, (45, 70, 3), dtype=torch.uint8, generator=source) for _ in range(40)
    ]
    prepared = [prepare(frame.numpy()) for frame in frames]
    for frame, ready in zip(frames, prepared, strict=True):
        expected, _ = model.preprocess(frame[None])
        assert torch.equal(ready.wait(), expected)
