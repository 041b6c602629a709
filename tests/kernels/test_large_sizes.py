"""Sizes beyond a GPU's limits are cut up: blocks of a grid, and memory for masks as large as a photograph."""

from typing import Any

import pytest
import torch
from torch import Tensor

from refsam_kernels import mask_postprocess, mask_postprocess_bits
from refsam_kernels.mask_postprocess import fallback
from refsam_kernels.rel_pos_attention import augmented


def test_more_windows_than_blocks_of_a_grid_are_cut_up(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, scale: float, **__: Any) -> Any:
        seen.append(q.shape[1])
        scores = scale * q @ k.mT
        statistic = torch.nn.functional.pad(scores.logsumexp(-1), (0, 3))  # to whole tiles
        return scores.softmax(-1) @ v, statistic, None, None

    monkeypatch.setattr(
        torch.ops.aten, "_scaled_dot_product_efficient_attention", attention, raising=False
    )
    q, k, v = torch.randn(3, 7, 5, 4).unbind(0)
    whole = augmented.efficient_attention(q, k, v, 0.5)
    monkeypatch.setattr(augmented, "MOST_HEADS", 3)
    parts = augmented.efficient_attention(q, k, v, 0.5)
    assert seen == [7, 3, 3, 1]
    assert all(torch.equal(x, y) for x, y in zip(whole, parts, strict=True))
    assert parts[1].shape == (7, 5)


@pytest.fixture
def as_on_gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The fallback computes as on a GPU whose chunks are small; the elements of each part that it makes."""
    monkeypatch.setattr(fallback, "has_exact_products", lambda logits: False)
    monkeypatch.setattr(fallback, "ELEMENTS_ELSEWHERE", 500)
    monkeypatch.setattr("refsam_kernels.core.chunking.ELEMENTS_ON_CPU", 500)
    made: list[int] = []
    along = fallback._along

    def noted(*arguments: Any) -> Tensor:
        made.append((found := along(*arguments)).numel())
        return found

    monkeypatch.setattr(fallback, "_along", noted)
    return made


@pytest.mark.parametrize("output", [(61, 47), (23, 101), (5, 400)])
def test_masks_larger_than_a_part_are_made_by_tiles(
    output: tuple[int, int], as_on_gpu: list[int]
) -> None:
    logits = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    sizes: dict[str, Any] = {"image_size": 64, "input_size": (40, 64), "output_size": output}
    wanted = mask_postprocess(logits, backend="reference", **sizes)
    assert torch.equal(mask_postprocess(logits, backend="fallback", **sizes), wanted)
    assert as_on_gpu
    assert max(as_on_gpu) <= 16 * max(output) + 500
    packed = mask_postprocess_bits(logits, backend="fallback", **sizes)
    assert torch.equal(torch.stack(packed.masks()), wanted)
