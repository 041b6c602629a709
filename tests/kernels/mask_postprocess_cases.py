"""Tests that every backend of mask_postprocess must pass: bytes, bits, run lengths. A test file makes a class per backend.

Logits are made so that none is near the threshold where results must be equal: there the order of a few float32 additions may
decide.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco
from torch import Tensor

from refsam_kernels import mask_postprocess, mask_postprocess_bits, mask_postprocess_rle
from refsam_kernels.core import libraries
from refsam_kernels.mask_postprocess import packed
from tests.kernels import operator_checks as checks
from tests.kernels.interpreter import slow_in_interpreter

Size = tuple[int, int]
SIZES = {  # logits, image_size, input_size, output_size
    "odd": ((2, 20, 20), 80, (50, 80), (37, 140)),
    "two-aspects": ((1, 33, 9), 40, (40, 11), (9, 300)),
    "portrait": ((2, 16, 16), 64, (64, 43), (91, 60)),
    "one-pixel": ((1, 1, 1), 1, (1, 1), (1, 1)),
    "one-pixel-in": ((1, 1, 1), 7, (3, 7), (5, 7)),
    "one-pixel-out": ((1, 13, 16), 37, (1, 37), (1, 1)),
    "same-size": ((2, 16, 16), 16, (16, 16), (16, 16)),
}
MIXED: dict[str, Any] = {
    "image_size": 80,
    "input_size": [(80, 61), (50, 80), (80, 80), (1, 1), (79, 3)],
    "output_size": [(33, 41), (64, 32), (1, 1), (100, 7), (31, 130)],
}

# The same test runs for every backend's class.
DRAWN = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.differing_executors],
)


def make_logits(shape: tuple[int, ...], seed: int = 42) -> Tensor:
    return 8 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def interpolated(logits: Tensor, image: int, cropped: Size, output: Size) -> Tensor:
    """The logits at full size, by the calls that segment-anything makes."""
    x = F.interpolate(logits[:, None], (image, image), mode="bilinear", align_corners=False)
    x = x[..., : cropped[0], : cropped[1]]
    return F.interpolate(x, output, mode="bilinear", align_corners=False)[:, 0]


def flips(masks: Tensor, logits: Tensor, full: Tensor, threshold: float = 0.0) -> int:
    """Pixels that differ although their logit is not at the threshold: not within 1e-5 of the largest logit."""
    decided = (full - threshold).abs() >= 1e-5 * logits.abs().max()
    return int(((masks != (full > threshold)) & decided).sum())


def coco_encoding(mask: Tensor) -> dict[str, Any]:
    return coco.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))


def on_host(statistics: packed.MaskStatistics) -> list[Tensor]:
    return [tensor.cpu() for tensor in statistics]


class MaskPostprocessCases:
    """Needs the name of the backend, and the device that its tensors are on."""

    backend: str
    device = "cpu"

    def masks(self, logits: Tensor, **sizes: Any) -> Tensor:
        return mask_postprocess(logits.to(self.device), **sizes, backend=self.backend).cpu()

    @pytest.mark.parametrize("threshold", [0.0, -2.5])
    @pytest.mark.parametrize(("shape", "image", "cropped", "output"), SIZES.values(), ids=SIZES)
    def test_equals_two_interpolations(
        self, shape: tuple[int, ...], image: int, cropped: Size, output: Size, threshold: float
    ) -> None:
        logits = make_logits(shape)
        sizes = {"image_size": image, "input_size": cropped, "output_size": output}
        masks = self.masks(logits, **sizes, threshold=threshold)
        assert masks.dtype == torch.bool
        assert masks.shape == (shape[0], *output)
        assert flips(masks, logits, interpolated(logits, image, cropped, output), threshold) == 0

    @pytest.mark.parametrize("layout", checks.LAYOUTS.values(), ids=checks.LAYOUTS)
    def test_any_layout(self, layout: Callable[[Tensor], Tensor]) -> None:
        logits = layout(make_logits((2, 8, 10)).to(self.device))
        sizes = {"image_size": 40, "input_size": (30, 40), "output_size": (20, 13)}
        for function in (mask_postprocess, mask_postprocess_bits):
            found, wanted = (
                function(x, **sizes, backend=self.backend) for x in (logits, logits.contiguous())
            )
            if function is mask_postprocess_bits:
                found, wanted = found.words, wanted.words
            assert torch.equal(found, wanted)

    @slow_in_interpreter
    def test_low_precision_is_resized_in_float32(self) -> None:
        logits = make_logits((2, 32, 32)).bfloat16()
        sizes = {"image_size": 128, "input_size": (128, 96), "output_size": (200, 150)}
        assert torch.equal(self.masks(logits, **sizes), self.masks(logits.float(), **sizes))

    @pytest.mark.parametrize("threshold", [0.0, -3.0])
    def test_masks_of_any_size_are_the_same_as_bytes_bits_and_runs(self, threshold: float) -> None:
        options = {"threshold": threshold, "backend": self.backend}
        logits = make_logits((5, 20, 20))
        one_by_one = zip(logits, MIXED["input_size"], MIXED["output_size"], strict=True)
        masks = [
            self.masks(x[None], image_size=80, input_size=i, output_size=o, threshold=threshold)[0]
            for x, i, o in one_by_one
        ]
        bits = mask_postprocess_bits(logits.to(self.device), **MIXED, **options)
        assert all(torch.equal(x.cpu(), y) for x, y in zip(bits.masks(), masks, strict=True))
        runs, statistics = mask_postprocess_rle(logits.to(self.device), **MIXED, **options)
        expected = [coco_encoding(mask) for mask in masks]
        assert runs == expected
        assert statistics.area.tolist() == [coco.area(mask) for mask in expected]
        for found, wanted in zip(statistics.box.tolist(), map(coco.toBbox, expected), strict=True):
            left, top, width, height = wanted
            assert found == [left, top, left + width, top + height]
        assert all(map(torch.equal, statistics, on_host(bits.statistics)))

    def test_words_and_statistics_are_the_references(self) -> None:
        """Again in a second run, bit by bit; what follows a mask's last row is 0."""
        logits = make_logits((5, 20, 20))
        wanted = mask_postprocess_bits(logits, **MIXED, backend="reference")
        for _ in range(2):
            found = mask_postprocess_bits(logits.to(self.device), **MIXED, backend=self.backend)
            assert torch.equal(found.words.cpu(), wanted.words)
            assert all(map(torch.equal, on_host(found.statistics), wanted.statistics))

    @slow_in_interpreter
    def test_more_masks_than_a_launch_takes(self) -> None:
        logits = make_logits((131, 4, 4))
        sizes: dict[str, Any] = {
            "image_size": 4,
            "input_size": (4, 4),
            "output_size": [(4 + i % 3, 4) for i in range(131)],
        }
        runs, statistics = mask_postprocess_rle(
            logits.to(self.device), **sizes, backend=self.backend
        )
        wanted = mask_postprocess_rle(logits, **sizes, backend="reference")
        assert runs == wanted[0]
        assert all(map(torch.equal, statistics, wanted[1]))

    @slow_in_interpreter
    def test_mask_of_many_blocks(self) -> None:
        """Columns of more than one word, more words than a block takes; long runs and short ones."""
        logits = make_logits((2, 12, 12))
        logits[:, 3:9] += 40
        sizes: dict[str, Any] = {
            "image_size": 48,
            "input_size": [(48, 30), (33, 48)],
            "output_size": [(150, 333), (61, 700)],
        }
        runs, _ = mask_postprocess_rle(logits.to(self.device), **sizes, backend=self.backend)
        assert runs == mask_postprocess_rle(logits, **sizes, backend="reference")[0]

    def test_stability_is_segment_anythings(self) -> None:
        """`calculate_stability_score`: the IoU of the masks at threshold + offset and threshold - offset."""
        logits = make_logits((3, 16, 16))
        logits[2] = -100.0
        sizes: dict[str, Any] = {"image_size": 16, "input_size": (16, 16), "output_size": (16, 16)}
        options: dict[str, Any] = {"threshold": 0.5, "stability_offset": 2.0}
        found = mask_postprocess_bits(
            logits.to(self.device), **sizes, **options, backend=self.backend
        ).statistics
        area, box, stability = on_host(found)
        intersections = (logits > 2.5).sum(dim=(1, 2)).float()
        unions = (logits > -1.5).sum(dim=(1, 2))
        torch.testing.assert_close(stability, intersections / unions.clamp(min=1))
        assert float(stability[2]) == 0
        assert not area[2]
        assert not box[2].any()

    def test_more_runs_than_expected_cost_a_second_round(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Runs that do not fit are neither lost nor written behind the end."""
        logits = make_logits((2, 16, 16))
        sizes: dict[str, Any] = {"image_size": 16, "input_size": (16, 16), "output_size": (16, 16)}

        def run() -> Any:
            return mask_postprocess_rle(logits.to(self.device), **sizes, backend=self.backend)[0]

        rounds = []
        fetch = packed._fetch
        monkeypatch.setattr(packed, "_fetch", lambda *a: rounds.append(a[3]) or fetch(*a))
        runs = run()
        assert len(rounds) == 1
        monkeypatch.setattr(packed, "RUNS_PER_COLUMN", 1)
        assert run() == runs
        pixels = torch.cat([torch.zeros(2, 1).bool(), (logits > 0).mT.flatten(1)], dim=1)
        changes = int((pixels[:, 1:] != pixels[:, :-1]).sum())
        assert rounds[1:] == [32, changes]

    def test_no_masks(self) -> None:
        nothing: dict[str, Any] = {"image_size": 8, "output_size": (9, 9), "backend": self.backend}
        logits = torch.zeros(0, 8, 8, device=self.device)
        masks = mask_postprocess(logits, input_size=(8, 8), **nothing)
        assert (masks.shape, masks.dtype) == ((0, 9, 9), torch.bool)
        for input_size in ((8, 8), []):
            bits = mask_postprocess_bits(logits, input_size=input_size, **nothing)
            assert bits.masks() == []
            assert bits.statistics.box.shape == (0, 4)
            assert mask_postprocess_rle(logits, input_size=input_size, **nothing)[0] == []

    def test_nan_is_outside_and_counted(self) -> None:
        """Below the public function, as on a device whose values are not looked at before."""
        logits = torch.full((2, 8, 8), 3.0)
        logits[1] = float("nan")
        words, statistics = torch.ops.refsam_kernels.mask_postprocess_bits(
            logits.to(self.device), 8, [8, 8] * 2, [8, 8] * 2, 0.0, 1.0, self.backend
        )
        assert statistics.tolist() == [[64, 64, 64, 0, 0, 8, 8, 0], [0, 0, 0, 0, 0, 0, 0, 64]]
        assert not words[8:].any()

    @slow_in_interpreter
    def test_opcheck(self) -> None:
        logits = make_logits((2, 5, 6)).to(self.device)
        operators, sizes = torch.ops.refsam_kernels, (24, [20, 24, 7, 9], [33, 41, 5, 70])
        for x in (logits, logits.mT.contiguous().mT):
            arguments = (x, 24, [20, 24], [33, 41], 0.0, self.backend)
            torch.library.opcheck(operators.mask_postprocess.default, arguments)
            arguments = (x, *sizes, 0.0, 1.0, self.backend)
            torch.library.opcheck(operators.mask_postprocess_bits.default, arguments)
        words, _ = operators.mask_postprocess_bits(logits, *sizes, 0.0, 1.0, self.backend)
        # Anything may stand behind the last run; compared with itself it must be the same.
        capacity = int(operators.mask_postprocess_runs(words, sizes[2], 0, self.backend)[1].sum())
        arguments = (words, sizes[2], capacity, self.backend)
        torch.library.opcheck(operators.mask_postprocess_runs.default, arguments)


class AnySizeCases(MaskPostprocessCases):
    """Beside these, sizes drawn at random, reductions by any factor among them."""

    @DRAWN
    @given(data=st.data())
    def test_equals_two_interpolations_at_any_size(self, data: st.DataObject) -> None:
        side = st.integers(1, 40)
        shape = (data.draw(st.integers(1, 3)), data.draw(side), data.draw(side))
        image = data.draw(st.integers(1, 90))
        cropped = (data.draw(st.integers(1, image)), data.draw(st.integers(1, image)))
        output = (data.draw(st.integers(1, 120)), data.draw(st.integers(1, 120)))
        logits = make_logits(shape, seed=data.draw(st.integers(0, 2**31)))
        masks = self.masks(logits, image_size=image, input_size=cropped, output_size=output)
        assert flips(masks, logits, interpolated(logits, image, cropped, output)) == 0

    @DRAWN
    @given(data=st.data())
    def test_run_lengths_at_any_size(self, data: st.DataObject) -> None:
        """Logits are -1 or 1 and nothing is resized, so that rounding decides nothing."""
        height, width = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))
        density = data.draw(st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]))
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
        mask = torch.rand(1, height, width, generator=generator) < density
        side = max(height, width)
        logits = torch.full((1, side, side), -1.0)
        logits[:, :height, :width] = mask.float() * 2 - 1
        runs, statistics = mask_postprocess_rle(
            logits.to(self.device),
            image_size=side,
            input_size=(height, width),
            output_size=(height, width),
            backend=self.backend,
        )
        assert runs == [coco_encoding(mask[0])]
        assert int(statistics.area) == int(mask.sum())


ARGUMENTS: dict[str, dict[str, Any]] = {
    "mask_postprocess": {
        "logits": torch.zeros(1, 8, 8),
        "image_size": 32,
        "input_size": [32, 32],
        "output_size": [4, 4],
        "threshold": 0.0,
    },
    "mask_postprocess_bits": {
        "logits": torch.zeros(1, 8, 8),
        "image_size": 8,
        "input_sizes": [8, 8],
        "output_sizes": [8, 8],
        "threshold": 0.0,
        "stability_offset": 1.0,
    },
    "mask_postprocess_runs": {
        "words": torch.zeros(8).int(),
        "output_sizes": [8, 8],
        "capacity": 1,
    },
}
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("", {"logits": torch.zeros(8, 8)}, "logits: got 2 dimensions, wanted 3"),
    ("", {"logits": torch.zeros(1, 8, 8).double()}, "logits: got dtype Double, wanted Float"),
    ("", {"logits": torch.zeros(1, 8, 16)[..., ::2]}, "logits: got strides of a view"),
    ("", {"logits": torch.zeros(1, 0, 8)}, "logits' height: got 0, wanted 1 to"),
    ("", {"image_size": 0}, "image_size: got 0, wanted 1 to"),
    ("", {"input_size": [33, 1]}, "input_size's height: got 33, wanted 1 to 32"),
    ("", {"input_size": [1, 2, 3]}, "input_size: got 3 numbers, wanted 2"),
    ("", {"output_size": [4, 0]}, "output_size's width: got 0, wanted 1 to"),
    ("", {"output_size": [2**40, 2**40]}, "output_size's height: got 1099511627776"),
    ("_bits", {"logits": torch.zeros(1, 8, 8).double()}, "logits: got dtype Double, wanted Float"),
    ("_bits", {"input_sizes": [8, 8, 8]}, "input_sizes: got 3 numbers, wanted 2"),
    ("_bits", {"output_sizes": []}, "output_sizes: got 0 numbers, wanted 2"),
    ("_bits", {"input_sizes": [8, 9]}, "input_size's width: got 9, wanted 1 to 8"),
    ("_bits", {"output_sizes": [0, 4]}, "output_size's height: got 0, wanted 1 to"),
    ("_bits", {"output_sizes": [2**20, 2**20]}, "output_size's pixels: got 1099511627776"),
    ("_runs", {"words": torch.zeros(8, 1).int()}, "words: got 2 dimensions, wanted 1"),
    ("_runs", {"words": torch.zeros(8)}, "words: got dtype Float, wanted Int"),
    ("_runs", {"words": torch.zeros(16).int()[::2]}, "words: got strides of a view"),
    ("_runs", {"words": torch.zeros(7).int()}, "words: got 7 words, wanted 8"),
    ("_runs", {"output_sizes": [8]}, "output_sizes: got 1 numbers, wanted"),
    ("_runs", {"capacity": -1}, "capacity: got -1, wanted at least 0"),
]


class LibraryCases:
    """A compiled library refuses wrong arguments itself, without the checks of the public functions."""

    library: str
    device = "cpu"

    @pytest.mark.parametrize(("function", "change", "message"), BAD)
    def test_library_names_the_argument_that_fails(
        self, function: str, change: dict[str, Any], message: str
    ) -> None:
        name = f"mask_postprocess{function}"
        arguments = [self.moved(value) for value in (ARGUMENTS[name] | change).values()]
        with pytest.raises(RuntimeError, match=message):
            getattr(libraries.load(self.library), name)(*arguments)

    def moved(self, value: Any) -> Any:
        """Like `Tensor.to`, which would make a view contiguous."""
        if not isinstance(value, Tensor):
            return value
        options: dict[str, Any] = {"dtype": value.dtype, "device": self.device}
        return torch.empty_strided(value.shape, value.stride(), **options).zero_()
