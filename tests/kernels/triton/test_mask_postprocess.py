"""mask_postprocess in Triton: masks, bits, statistics and runs, equal to the reference's."""

from typing import Any

import pytest
import torch

from refsam_kernels import mask_postprocess, mask_postprocess_bits, mask_postprocess_rle
from refsam_kernels.mask_postprocess import packed
from tests.kernels.interpreter import DEVICE
from tests.kernels.test_mask_postprocess import flips, interpolated, make_logits

MIXED: dict[str, Any] = {
    "image_size": 80,
    "input_size": [(80, 61), (50, 80), (80, 80), (1, 1), (79, 3)],
    "output_size": [(33, 41), (64, 32), (1, 1), (100, 7), (31, 130)],
}


@pytest.mark.parametrize("threshold", [0.0, -2.5])
@pytest.mark.parametrize(
    ("shape", "image", "cropped", "output"),
    [((2, 20, 20), 80, (50, 80), (37, 140)), ((1, 33, 9), 40, (40, 11), (9, 300))],
)
def test_masks_equal_two_interpolations(
    shape: tuple[int, ...],
    image: int,
    cropped: tuple[int, int],
    output: tuple[int, int],
    threshold: float,
) -> None:
    logits = make_logits(shape)
    masks = mask_postprocess(
        logits.to(DEVICE),
        image_size=image,
        input_size=cropped,
        output_size=output,
        threshold=threshold,
        backend="triton",
    )
    assert flips(masks.cpu(), logits, interpolated(logits, image, cropped, output), threshold) == 0


def test_bits_and_runs_of_mixed_sizes_are_the_references() -> None:
    """No logit is near the threshold, so that the order of additions decides nothing."""
    logits = make_logits((5, 20, 20))
    found = mask_postprocess_bits(logits.to(DEVICE), **MIXED, backend="triton")
    wanted = mask_postprocess_bits(logits, **MIXED, backend="reference")
    assert torch.equal(found.words.cpu(), wanted.words)
    assert all(
        torch.equal(x.cpu(), y) for x, y in zip(found.statistics, wanted.statistics, strict=True)
    )
    runs, statistics = mask_postprocess_rle(logits.to(DEVICE), **MIXED, backend="triton")
    assert runs == mask_postprocess_rle(logits, **MIXED, backend="reference")[0]
    assert all(map(torch.equal, statistics, wanted.statistics))


def test_more_runs_than_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit is neither lost nor written behind the end."""
    logits = make_logits((2, 16, 16)).to(DEVICE)
    sizes: dict[str, Any] = {"image_size": 16, "input_size": (16, 16), "output_size": (16, 16)}
    runs, _ = mask_postprocess_rle(logits, **sizes, backend="triton")
    monkeypatch.setattr(packed, "RUNS_PER_COLUMN", 1)
    assert mask_postprocess_rle(logits, **sizes, backend="triton")[0] == runs


def test_nan_is_outside_and_counted() -> None:
    """Below the check of the public function, which can look at values on the CPU only."""
    logits = torch.full((2, 8, 8), 3.0)
    logits[1] = float("nan")
    words, statistics = torch.ops.refsam_kernels.mask_postprocess_bits(
        logits.to(DEVICE), 8, [8, 8] * 2, [8, 8] * 2, 0.0, 1.0, "triton"
    )
    assert statistics.tolist() == [[64, 64, 64, 0, 0, 8, 8, 0], [0, 0, 0, 0, 0, 0, 0, 64]]
    assert not words[8:].any()


def test_no_masks() -> None:
    nothing: dict[str, Any] = {
        "image_size": 8,
        "input_size": (8, 8),
        "output_size": (9, 9),
        "backend": "triton",
    }
    logits = torch.zeros(0, 8, 8, device=DEVICE)
    assert mask_postprocess(logits, **nothing).shape == (0, 9, 9)
    assert mask_postprocess_bits(logits, **nothing).masks() == []
    assert mask_postprocess_rle(logits, **nothing)[0] == []
