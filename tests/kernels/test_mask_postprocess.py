"""mask_postprocess: masks as after SAM's two F.interpolate, at any size; the compiled backends have their own file."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from refsam_kernels import mask_postprocess, use_backend
from refsam_kernels.mask_postprocess.resize import resize_matrix, two_resizes

BACKENDS = ["reference", "fallback"]
SIZES = {  # logits, image_size, input_size, output_size
    "480p": ((3, 256, 256), 1024, (576, 1024), (480, 854)),
    "1080p": ((1, 256, 256), 1024, (576, 1024), (1080, 1920)),
    "portrait": ((2, 80, 80), 320, (320, 213), (911, 607)),
    "odd": ((2, 64, 63), 255, (190, 255), (63, 127)),
    "one-pixel": ((1, 1, 1), 1, (1, 1), (1, 1)),
    "shrinking": ((2, 300, 50), 50, (49, 50), (9, 1000)),
}


def make_logits(shape: tuple[int, ...], seed: int = 42) -> Tensor:
    return 8 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def interpolated(
    logits: Tensor, image: int, cropped: tuple[int, int], output: tuple[int, int]
) -> Tensor:
    """The logits at full size, by the calls that segment-anything makes."""
    x = F.interpolate(logits[:, None], (image, image), mode="bilinear", align_corners=False)
    x = x[..., : cropped[0], : cropped[1]]
    return F.interpolate(x, output, mode="bilinear", align_corners=False)[:, 0]


def flips(masks: Tensor, logits: Tensor, full: Tensor, threshold: float = 0.0) -> int:
    """Pixels that differ although their logit is not at the threshold: not within 1e-5 of the largest logit."""
    decided = (full - threshold).abs() >= 1e-5 * logits.abs().max()
    return int(((masks != (full > threshold)) & decided).sum())


@pytest.mark.parametrize(("shape", "image", "cropped", "output"), SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("threshold", [0.0, -2.5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_two_interpolations(
    backend: str,
    threshold: float,
    shape: tuple[int, ...],
    image: int,
    cropped: tuple[int, int],
    output: tuple[int, int],
) -> None:
    logits = make_logits(shape)
    full = interpolated(logits, image, cropped, output)
    masks = mask_postprocess(
        logits,
        image_size=image,
        input_size=cropped,
        output_size=output,
        threshold=threshold,
        backend=backend,
    )
    assert masks.dtype == torch.bool
    assert masks.shape == (shape[0], *output)
    assert flips(masks, logits, full, threshold) == 0
    if backend == "reference":
        assert torch.equal(masks, full > threshold)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_fallback_equals_two_interpolations_at_any_size(data: st.DataObject) -> None:
    side = st.integers(1, 40)
    shape = (data.draw(st.integers(1, 3)), data.draw(side), data.draw(side))
    image = data.draw(st.integers(1, 90))
    cropped = (data.draw(st.integers(1, image)), data.draw(st.integers(1, image)))
    output = (data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300)))
    logits = make_logits(shape, seed=data.draw(st.integers(0, 2**31)))
    masks = mask_postprocess(
        logits, image_size=image, input_size=cropped, output_size=output, backend="fallback"
    )
    assert flips(masks, logits, interpolated(logits, image, cropped, output)) == 0


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = make_logits((3, 20, 20))
    arguments: dict[str, Any] = {
        "image_size": 80,
        "input_size": (80, 61),
        "output_size": (100, 77),
        "backend": "fallback",
    }
    whole = mask_postprocess(logits, **arguments)
    monkeypatch.setattr("refsam_kernels.chunks.ELEMENTS_ON_CPU", 7 * 77)
    assert torch.equal(mask_postprocess(logits, **arguments), whole)


@pytest.mark.parametrize(("low", "image", "cropped", "output"), [(64, 255, 190, 480), (9, 7, 7, 3)])
def test_resize_matrix_is_narrow_and_averages(
    low: int, image: int, cropped: int, output: int
) -> None:
    """What makes bands worthwhile: at most four neighbouring input positions per output position, weights of sum 1."""
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
    shape, image, cropped, output = SIZES[name]
    logits = make_logits(shape)
    resizes = two_resizes(shape[1:], image, cropped, output, logits.dtype, logits.device)
    full = resizes.columns(resizes.rows(logits))
    assert (full - interpolated(logits, image, cropped, output)).abs().max() < 1e-6 * full.max()


def test_low_precision_is_resized_in_float32() -> None:
    logits = make_logits((2, 32, 32)).bfloat16()
    arguments: dict[str, Any] = {
        "image_size": 128,
        "input_size": (128, 96),
        "output_size": (200, 150),
    }
    for backend in BACKENDS:
        masks = mask_postprocess(logits, **arguments, backend=backend)
        assert torch.equal(masks, mask_postprocess(logits.float(), **arguments, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_masks(backend: str) -> None:
    masks = mask_postprocess(
        torch.zeros(0, 8, 8),
        image_size=32,
        input_size=(32, 24),
        output_size=(50, 40),
        backend=backend,
    )
    assert masks.shape == (0, 50, 40)
    assert masks.dtype == torch.bool


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_are_read_correctly(backend: str) -> None:
    logits = make_logits((4, 32, 60))[1:, ::2, 5:45:2]
    arguments: dict[str, Any] = {"image_size": 80, "input_size": (60, 80), "output_size": (90, 120)}
    masks = mask_postprocess(logits, **arguments, backend=backend)
    assert torch.equal(masks, mask_postprocess(logits.clone(), **arguments, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    logits = make_logits((2, 5, 6))
    arguments = (logits, 24, [20, 24], [33, 41], 0.0, backend)
    operator = torch.ops.refsam_kernels.mask_postprocess.default
    for x in (logits, logits.mT.contiguous().mT):
        torch.library.opcheck(operator, (x, *arguments[1:]))


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
