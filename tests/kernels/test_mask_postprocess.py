"""mask_postprocess by every backend that runs on the CPU: `mask_postprocess_cases` says what all of them must do.

Triton's and CUDA's tests are tests/kernels/triton/test_mask_postprocess.py and tests/kernels/cuda/test_mask_postprocess.py.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from refsam_kernels import mask_postprocess, mask_postprocess_bits, use_backend
from refsam_kernels.core import libraries
from refsam_kernels.mask_postprocess.layout import STATISTICS, unpack
from refsam_kernels.mask_postprocess.resize import resize_matrix, two_resizes
from tests.kernels.mask_postprocess_cases import (
    AnySizeCases,
    LibraryCases,
    flips,
    interpolated,
    make_logits,
)

FULL_SIZES = {  # logits, image_size, input_size, output_size
    "480p": ((3, 256, 256), 1024, (576, 1024), (480, 854)),
    "1080p": ((1, 256, 256), 1024, (576, 1024), (1080, 1920)),
    "portrait": ((2, 80, 80), 320, (320, 213), (911, 607)),
    "odd": ((2, 64, 63), 255, (190, 255), (63, 127)),
    "shrinking": ((2, 300, 50), 50, (49, 50), (9, 1000)),
}


def skip_if_not_built() -> None:
    """Skips the test with the reason if there is no compiled library."""
    try:
        libraries.load("cpu")
    except ImportError as reason:
        pytest.skip(str(reason))


class TestReference(AnySizeCases):
    backend = "reference"


class TestFallback(AnySizeCases):
    backend = "fallback"


class TestCpu(AnySizeCases):
    backend = "cpu"

    @pytest.fixture(autouse=True)
    def built(self) -> None:
        skip_if_not_built()


class TestCpuLibrary(LibraryCases):
    library = "cpu"

    @pytest.fixture(autouse=True)
    def built(self) -> None:
        skip_if_not_built()


@pytest.mark.parametrize(
    ("shape", "image", "cropped", "output"), FULL_SIZES.values(), ids=FULL_SIZES
)
@pytest.mark.parametrize("backend", ["reference", "fallback", "cpu"])
def test_full_size(
    backend: str,
    shape: tuple[int, ...],
    image: int,
    cropped: tuple[int, int],
    output: tuple[int, int],
) -> None:
    if backend == "cpu":
        skip_if_not_built()
    logits = make_logits(shape)
    full = interpolated(logits, image, cropped, output)
    sizes = {"image_size": image, "input_size": cropped, "output_size": output}
    masks = mask_postprocess(logits, **sizes, backend=backend)
    assert flips(masks, logits, full) == 0
    if backend == "reference":
        assert torch.equal(masks, full > 0)


CLOUDS = {  # flat parts, outlines, and what is neither; by the sizes that the compiled kernels tell apart
    "enlarged": ((3, 40, 40), 160, (150, 101), (130, 211)),
    "one-resize": ((3, 40, 40), 40, (40, 40), (97, 203)),
    "smaller-than-a-vector": ((3, 5, 6), 20, (20, 20), (70, 33)),
    "shrunk": ((3, 120, 90), 40, (37, 40), (35, 21)),
}


@pytest.mark.parametrize(("shape", "image", "cropped", "output"), CLOUDS.values(), ids=CLOUDS)
@pytest.mark.parametrize("name", ["portable", "avx2", "avx512"])
def test_every_instruction_set_makes_the_masks(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    shape: tuple[int, ...],
    image: int,
    cropped: tuple[int, int],
    output: tuple[int, int],
) -> None:
    """As bytes and bits; parts whose logits are all far from the thresholds are made otherwise than the rest."""
    skip_if_not_built()
    monkeypatch.setenv("REFSAM_CPU_INSTRUCTION_SET", name)
    coarse = 20 * torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    logits = F.interpolate(coarse, shape[1:], mode="bilinear")[:, 0]
    full = interpolated(logits, image, cropped, output)
    sizes: dict[str, Any] = {"image_size": image, "input_size": cropped, "output_size": output}
    sizes["backend"] = "cpu"
    try:
        masks = mask_postprocess(logits, **sizes, threshold=1.5)
    except RuntimeError as reason:
        pytest.skip(str(reason).splitlines()[0])
    assert flips(masks, logits, full, 1.5) == 0
    packed = mask_postprocess_bits(logits, **sizes, threshold=1.5, stability_offset=2.0)
    assert torch.equal(torch.stack(packed.masks()), masks)
    areas = [(full > limit).sum(dim=(1, 2)).tolist() for limit in (1.5, 3.5, -0.5)]
    area, stability = packed.statistics.area.tolist(), packed.statistics.stability.tolist()
    assert area == pytest.approx(areas[0], abs=2)
    assert stability == pytest.approx([a / b for a, b in zip(*areas[1:], strict=True)], abs=2e-3)


def test_nan_changes_and_counts_the_pixels_that_share_it() -> None:
    """Below the public function, which refuses NaN; beside a flat part, whose pixels are not looked at one by one."""
    skip_if_not_built()
    logits = torch.full((1, 40, 40), 5.0)
    logits[0, 20:, 20:] = -5.0
    broken = logits.clone()
    broken[0, 3, 30] = broken[0, 30, 3] = broken[0, 39, 39] = float("nan")
    sizes = (160, [160, 131], [131, 203])
    of_bits = torch.ops.refsam_kernels.mask_postprocess_bits
    words, statistics = of_bits(broken, *sizes, 0.0, 1.0, "cpu")
    touched, _ = of_bits(broken.isnan().float(), *sizes, 0.0, 1.0, "cpu")
    whole, _ = of_bits(logits, *sizes, 0.0, 1.0, "cpu")
    assert torch.equal(words, whole & ~touched)
    (mask,) = unpack(touched, [(131, 203)])
    assert 0 < int(mask.sum()) == int(statistics[0, STATISTICS.index("nan")])


def test_cpu_result_does_not_depend_on_the_number_of_threads() -> None:
    skip_if_not_built()
    logits = make_logits((3, 64, 64))
    sizes: dict[str, Any] = {
        "image_size": 256,
        "input_size": (256, 200),
        "output_size": (300, 240),
    }
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = mask_postprocess(logits, **sizes, backend="cpu")
        torch.set_num_threads(4)
        four = mask_postprocess(logits, **sizes, backend="cpu")
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, four)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = make_logits((3, 20, 20))
    arguments: dict[str, Any] = {
        "image_size": 80,
        "input_size": (80, 61),
        "output_size": (100, 77),
        "backend": "fallback",
    }
    whole = mask_postprocess(logits, **arguments)
    monkeypatch.setattr("refsam_kernels.core.chunking.ELEMENTS_ON_CPU", 7 * 77)
    assert torch.equal(mask_postprocess(logits, **arguments), whole)


@pytest.mark.parametrize(("low", "image", "cropped", "output"), [(64, 255, 190, 480), (9, 7, 7, 3)])
def test_resize_matrix_is_narrow_and_averages(
    low: int, image: int, cropped: int, output: int
) -> None:
    """Bands are worthwhile: at most four neighbouring input positions per output position, weights of sum 1."""
    matrix = resize_matrix(low, image, cropped, output, torch.float64)
    assert matrix.shape == (output, low)
    torch.testing.assert_close(matrix.sum(dim=1), torch.ones(output, dtype=torch.float64))
    for row in matrix:
        (used,) = row.nonzero(as_tuple=True)
        assert len(used) <= 4
        assert used.max() - used.min() <= max(3, 2 * low // image + 1)


@pytest.mark.parametrize("name", ["480p", "1080p", "odd"])
def test_resized_logits_round_positions_as_pytorch(name: str) -> None:
    """Exact positions instead of PyTorch's float32 ones would be 1e-4 of the largest logit off at 1080p."""
    shape, image, cropped, output = FULL_SIZES[name]
    logits = make_logits(shape)
    resizes = two_resizes(shape[1:], image, cropped, output, logits.dtype, logits.device)
    full = resizes.columns(resizes.rows(logits))
    assert (full - interpolated(logits, image, cropped, output)).abs().max() < 1e-6 * full.max()


def test_compiles_into_one_graph() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def area(logits: Tensor) -> Tensor:
        masks = mask_postprocess(
            logits.sigmoid() - 0.5, image_size=48, input_size=(48, 30), output_size=(64, 40)
        )
        return masks.sum(dim=(1, 2))

    logits = make_logits((3, 12, 12))
    full = interpolated(logits.sigmoid() - 0.5, 48, (48, 30), (64, 40))
    with use_backend("reference"):
        assert torch.equal(area(logits), (full > 0).sum(dim=(1, 2)))


def test_result_needs_no_gradient() -> None:
    logits = make_logits((1, 8, 8)).requires_grad_()
    masks = mask_postprocess(logits, image_size=32, input_size=(32, 32), output_size=(9, 9))
    assert not masks.requires_grad


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"logits": torch.zeros(8, 8)}, r"logits: got shape \(8, 8\), wanted \(P, 4h, 4w\)"),
    "dtype": ({"logits": torch.zeros(1, 8, 8).bool()}, "logits: got torch.bool, wanted a floating point dtype"),
    "empty": ({"logits": torch.zeros(1, 8, 0)}, r"logits: got shape \(1, 8, 0\), wanted no empty mask"),
    "nan": ({"logits": torch.tensor([[[0.0, float("nan")]]])}, "logits: got 1 of 2 values not finite, wanted finite"),
    "image-size": ({"image_size": 0}, "image_size: got 0, wanted a positive number of pixels"),
    "crop": ({"input_size": (32, 33)}, r"input_size: got \(32, 33\), wanted at most image_size = 32 each"),
    "crop-of-one": ({"input_size": (32,)}, r"input_size: got \(32,\), wanted a positive \(height, width\)"),
    "no-output": ({"output_size": (4, 0)}, r"output_size: got \(4, 0\), wanted a positive \(height, width\)"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_rejects(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "logits": torch.zeros(1, 8, 8),
        "image_size": 32,
        "input_size": (32, 32),
        "output_size": (4, 4),
    }
    with pytest.raises(ValueError, match=message):
        mask_postprocess(**(arguments | change))
