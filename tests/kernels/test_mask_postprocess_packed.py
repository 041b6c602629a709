"""mask_postprocess to packed bits and COCO run lengths: the same masks, byte-equal to pycocotools, with their statistics."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco
from torch import Tensor

from refsam_kernels import (
    libraries,
    mask_postprocess,
    mask_postprocess_bits,
    mask_postprocess_rle,
    use_backend,
)
from refsam_kernels.mask_postprocess import packed
from refsam_kernels.mask_postprocess.run_lengths import compress, encode
from tests.kernels.test_mask_postprocess import make_logits

BACKENDS = ["reference", "fallback", "cpu"]
MIXED: dict[str, Any] = {
    "image_size": 80,
    "input_size": [(80, 61), (50, 80), (80, 80), (1, 1), (79, 3)],
    "output_size": [(33, 41), (64, 32), (1, 1), (100, 7), (31, 130)],
}


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """A backend that runs on the CPU; the compiled one is skipped with the reason if it was not built."""
    if request.param == "cpu":
        try:
            libraries.load("cpu")
        except ImportError as reason:
            pytest.skip(str(reason))
    return request.param


def separate_masks(logits: Tensor, sizes: dict[str, Any], backend: str) -> list[Tensor]:
    """The masks one by one, by the operator that gives bytes."""
    pairs = zip(sizes["input_size"], sizes["output_size"], strict=True)
    return [
        mask_postprocess(
            logits[i : i + 1],
            image_size=sizes["image_size"],
            input_size=cropped,
            output_size=output,
            threshold=sizes.get("threshold", 0.0),
            backend=backend,
        )[0]
        for i, (cropped, output) in enumerate(pairs)
    ]


def coco_encoding(mask: Tensor) -> dict[str, Any]:
    return coco.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))


@pytest.mark.parametrize("threshold", [0.0, -3.0])
def test_masks_of_any_size_are_the_same_as_bytes_bits_and_runs(
    backend: str, threshold: float
) -> None:
    sizes = MIXED | {"threshold": threshold}
    logits = make_logits((5, 20, 20))
    masks = separate_masks(logits, sizes, backend)
    bits = mask_postprocess_bits(logits, **sizes, backend=backend)
    assert all(torch.equal(x, y) for x, y in zip(bits.masks(), masks, strict=True))
    runs, statistics = mask_postprocess_rle(logits, **sizes, backend=backend)
    expected = [coco_encoding(mask) for mask in masks]
    assert runs == expected
    assert statistics.area.tolist() == [coco.area(mask) for mask in expected]
    for found, wanted in zip(statistics.box.tolist(), map(coco.toBbox, expected), strict=True):
        left, top, width, height = wanted
        assert found == [left, top, left + width, top + height]
    assert all(map(torch.equal, statistics, bits.statistics))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_backends_agree_at_any_size(data: st.DataObject) -> None:
    """Logits are -1 or 1 and nothing is resized, so that rounding decides nothing."""
    height, width = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
    density = data.draw(st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    mask = torch.rand(1, height, width, generator=generator) < density
    side = max(height, width)
    logits = torch.full((1, side, side), -1.0)
    logits[:, :height, :width] = mask.float() * 2 - 1
    sizes: dict[str, Any] = {
        "image_size": side,
        "input_size": (height, width),
        "output_size": (height, width),
    }
    for backend in data.draw(st.permutations(["reference", "fallback", ""])):
        runs, statistics = mask_postprocess_rle(logits, **sizes, backend=backend or None)
        assert runs == [coco_encoding(mask[0])]
        assert int(statistics.area) == int(mask.sum())


def test_stability_is_segment_anythings(backend: str) -> None:
    """`calculate_stability_score`: the IoU of the masks at threshold + offset and threshold - offset."""
    logits = make_logits((3, 16, 16))
    logits[2] = -100.0
    sizes: dict[str, Any] = {"image_size": 16, "input_size": (16, 16), "output_size": (16, 16)}
    found = mask_postprocess_bits(
        logits, **sizes, threshold=0.5, stability_offset=2.0, backend=backend
    ).statistics
    intersections = (logits > 2.5).sum(dim=(1, 2)).float()
    unions = (logits > -1.5).sum(dim=(1, 2))
    torch.testing.assert_close(found.stability, intersections / unions.clamp(min=1))
    assert float(found.stability[2]) == 0
    assert not found.area[2]
    assert not found.box[2].any()


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


def test_long_runs_are_written_in_several_characters() -> None:
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
        3,
    ]
    found = compress(torch.tensor(lengths))
    total = sum(lengths)
    assert found == coco.frPyObjects({"size": [total, 1], "counts": lengths}, total, 1)["counts"]


def test_largest_mask_is_encoded() -> None:
    height, width = 2**16, 2**15 - 1
    encoded = encode(torch.tensor([height * width - 1], dtype=torch.int32), (height, width))
    assert coco.area(encoded) == 1


def test_more_runs_than_expected_cost_a_second_round(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits = make_logits((2, 16, 16))
    sizes: dict[str, Any] = {"image_size": 16, "input_size": (16, 16), "output_size": (16, 16)}
    runs, _ = mask_postprocess_rle(logits, **sizes, backend=backend)
    rounds = []
    fetch = packed._fetch
    monkeypatch.setattr(packed, "_fetch", lambda *a: rounds.append(a[3]) or fetch(*a))
    assert mask_postprocess_rle(logits, **sizes, backend=backend)[0] == runs
    assert len(rounds) == 1
    monkeypatch.setattr(packed, "RUNS_PER_COLUMN", 1)
    assert mask_postprocess_rle(logits, **sizes, backend=backend)[0] == runs
    pixels = torch.cat([torch.zeros(2, 1).bool(), (logits > 0).mT.flatten(1)], dim=1)
    changes = int((pixels[:, 1:] != pixels[:, :-1]).sum())
    assert rounds[1:] == [32, changes]


def test_no_masks(backend: str) -> None:
    nothing: dict[str, Any] = {"image_size": 8, "output_size": (9, 9), "backend": backend}
    logits = torch.zeros(0, 8, 8)
    for input_size in ((8, 8), []):
        bits = mask_postprocess_bits(logits, input_size=input_size, **nothing)
        assert bits.masks() == []
        assert bits.statistics.box.shape == (0, 4)
        assert mask_postprocess_rle(logits, input_size=input_size, **nothing)[0] == []


def test_nan_is_outside_and_counted(backend: str) -> None:
    """Below the public function, as on a device whose values are not looked at before."""
    logits = torch.full((2, 8, 8), 3.0)
    logits[1] = float("nan")
    words, statistics = torch.ops.refsam_kernels.mask_postprocess_bits(
        logits, 8, [8, 8] * 2, [8, 8] * 2, 0.0, 1.0, backend
    )
    assert statistics.tolist() == [[64, 64, 64, 0, 0, 8, 8, 0], [0, 0, 0, 0, 0, 0, 0, 64]]
    assert not words[8:].any()


def test_run_lengths_refuse_nan_where_values_were_not_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packed, "check_finite", lambda name, tensor: None)
    logits = torch.zeros(1, 8, 8)
    logits[0, :2, :2] = float("nan")
    with pytest.raises(ValueError, match="logits: got 4 pixels NaN after resizing, wanted finite"):
        mask_postprocess_rle(logits, image_size=8, input_size=(8, 8), output_size=(8, 8))


def test_opcheck(backend: str) -> None:
    logits = make_logits((2, 5, 6))
    sizes = (24, [20, 24, 7, 9], [33, 41, 5, 70])
    operators = torch.ops.refsam_kernels
    for x in (logits, logits.mT.contiguous().mT):
        arguments = (x, *sizes, 0.0, 1.0, backend)
        torch.library.opcheck(operators.mask_postprocess_bits.default, arguments)
    words, _ = operators.mask_postprocess_bits(logits, *sizes, 0.0, 1.0, backend)
    # What stands behind the last run is anything: compared with itself it must be the same.
    capacity = int(operators.mask_postprocess_runs(words, sizes[2], 0, backend)[1].sum())
    arguments = (words, sizes[2], capacity, backend)
    torch.library.opcheck(operators.mask_postprocess_runs.default, arguments)


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
