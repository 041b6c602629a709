"""COCO run lengths written out, and what the functions that pack masks refuse; the rest is in `mask_postprocess_cases`."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco
from torch import Tensor

from refsam_kernels import (
    mask_postprocess,
    mask_postprocess_bits,
    mask_postprocess_rle,
    use_backend,
)
from refsam_kernels.core import libraries
from refsam_kernels.mask_postprocess import packed
from refsam_kernels.mask_postprocess.run_lengths import encode
from tests.kernels.mask_postprocess_cases import MIXED, make_logits


@pytest.mark.parametrize(
    ("mask", "counts"),
    [
        ([[0, 1], [1, 1]], b"13"),  # runs 1, 3
        ([[0, 0], [0, 0]], b"4"),
        ([[1, 1], [1, 1]], b"04"),  # zeros come first, even if there is none
    ],
)
def test_small_masks_written_out(mask: list[list[int]], counts: bytes) -> None:
    logits = torch.tensor([mask]).float() - 0.5
    sizes: dict[str, Any] = {"image_size": 2, "input_size": (2, 2), "output_size": (2, 2)}
    assert mask_postprocess_rle(logits, **sizes)[0] == [{"size": [2, 2], "counts": counts}]


@pytest.fixture(params=["compiled", "torch"])
def written_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run lengths are written by the compiled library, or as where there is none."""
    if request.param == "torch":

        def load(name: str) -> None:
            raise ImportError(name)

        monkeypatch.setattr(libraries, "load", load)


def test_long_runs_are_written_in_several_characters(written_by: None) -> None:
    """Differences of both signs, at and around where a number takes one more character; decoded by pycocotools."""
    lengths = [
        1,
        15,
        16,
        17,
        31,
        32,
        511,
        512,
        513,
        1,
        16383,
        16384,
        1,
        600_000,
        2,
        40_000_000,
        1,
        4,
    ]
    height, width = 24, sum(lengths) // 24
    ends = torch.tensor(lengths[:-1]).cumsum(0).int()
    wanted = coco.frPyObjects({"size": [height, width], "counts": lengths}, height, width)["counts"]
    few, nothing = (torch.tensor(each, dtype=torch.int32) for each in ([3, 5], []))
    found = encode([few, ends, nothing], [(3, 3), (height, width), (2, 2)])
    assert [each["counts"] for each in found] == [b"324", wanted, b"4"]


def test_largest_mask_is_encoded(written_by: None) -> None:
    height, width = 2**16, 2**15 - 1
    ends = torch.tensor([height * width - 1], dtype=torch.int32)
    (encoded,) = encode([ends], [(height, width)])
    assert coco.area(encoded) == 1


def test_compiled_characters_refuse_other_counts() -> None:
    try:
        characters = libraries.load("cpu").mask_postprocess_characters
    except ImportError as reason:
        pytest.skip(str(reason))
    ends = torch.tensor([3, 5], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="counts: got 3, wanted 0 to 2"):
        characters(ends, [3], [3, 3])
    with pytest.raises(RuntimeError, match="counts: got 1, wanted one for each of 2 masks"):
        characters(ends, [2], [3, 3, 2, 2])


def test_run_lengths_refuse_nan_where_values_were_not_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packed, "check_finite", lambda name, tensor: None)
    logits = torch.zeros(1, 8, 8)
    logits[0, :2, :2] = float("nan")
    with pytest.raises(ValueError, match="logits: got 4 pixels NaN after resizing, wanted finite"):
        mask_postprocess_rle(logits, image_size=8, input_size=(8, 8), output_size=(8, 8))


def test_bits_compile_into_one_graph() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def area(logits: Tensor) -> Tensor:
        return mask_postprocess_bits(logits.sigmoid() - 0.5, **MIXED).statistics.area

    logits = make_logits((5, 12, 12))
    with use_backend("reference"):
        wanted = mask_postprocess_bits(logits.sigmoid() - 0.5, **MIXED).statistics.area
        assert torch.equal(area(logits), wanted)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"logits": torch.zeros(8, 8)}, r"logits: got shape \(8, 8\), wanted \(P, 4h, 4w\)"),
    "nan": ({"logits": torch.full((2, 8, 8), torch.nan)}, "logits: got 128 of 128 values not finite, wanted finite"),
    "number-of-inputs": ({"input_size": [(32, 32)]}, "input_size: got 1 sizes, wanted one, or 2 as logits"),
    "number-of-outputs": ({"output_size": [(4, 4)] * 3}, "output_size: got 3 sizes, wanted one, or 2 as logits"),
    "one-crop-too-large": ({"input_size": [(32, 32), (33, 1)]}, r"input_size: got \(33, 1\), wanted at most image_size"),
    "one-output-empty": ({"output_size": [(4, 4), (4, 0)]}, r"output_size: got \(4, 0\), wanted a positive"),
    "three-sides": ({"output_size": (4, 4, 4)}, r"output_size: got \(4, 4, 4\), wanted a positive \(height, width\)"),
    "too-large": ({"output_size": (2**16, 2**16)}, r"output_size: got \(65536, 65536\), wanted at most 2147483647"),
    "offset": ({"stability_offset": -1.0}, "stability_offset: got -1.0, wanted at least 0"),
}  # fmt: skip


@pytest.mark.parametrize("function", [mask_postprocess_bits, mask_postprocess_rle])
@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_rejects(function: Any, change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "logits": torch.zeros(2, 8, 8),
        "image_size": 32,
        "input_size": (32, 32),
        "output_size": (4, 4),
    }
    with pytest.raises(ValueError, match=message):
        function(**(arguments | change))


@pytest.mark.parametrize(
    "form",
    [
        list,
        np.array,
        torch.tensor,
        lambda sizes: [np.array(size) for size in sizes],
        lambda sizes: [torch.tensor(size) for size in sizes],
        lambda sizes: [tuple(map(np.int64, size)) for size in sizes],
        lambda sizes: tuple(map(list, sizes)),
    ],
)
def test_sizes_in_any_form(form: Callable[[Any], Any]) -> None:
    logits = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(0))
    for sizes in ([(12, 16), (16, 9)], [(12, 16)] * 2):
        wanted = mask_postprocess_rle(logits, image_size=16, input_size=sizes, output_size=sizes)
        given = form(sizes)
        found = mask_postprocess_rle(logits, image_size=16, input_size=given, output_size=given)
        assert found[0] == wanted[0]
    one = form([(12, 16)])[0]
    bits = mask_postprocess_bits(logits, image_size=16, input_size=one, output_size=one)
    plain = mask_postprocess(logits, image_size=16, input_size=one, output_size=one)
    assert torch.equal(torch.stack(list(bits.masks())), plain)
