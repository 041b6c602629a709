"""mask_loss: the plain formula, any size, gradients, and its place among torch's tools.

Tests of all backends are in `mask_loss_cases`.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from refsam_kernels import mask_loss
from tests.kernels import operator_checks as checks
from tests.kernels.mask_loss_cases import SIZES, TOLERANCES, MaskLossCases, make_inputs

BACKENDS = ["reference", "fallback"]


class TestReference(MaskLossCases):
    backend = "reference"
    dtypes = tuple(TOLERANCES)


class TestFallback(TestReference):
    backend = "fallback"


def loss(*, backend: str | None, **arguments: Any) -> tuple[Tensor, Tensor]:
    """The operator at the sizes that most tests use."""
    sizes: dict[str, Any] = {"image_size": 80, "input_size": (50, 80)}
    return mask_loss(**(sizes | arguments), backend=backend)


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    return make_inputs((3, 20, 20), (37, 51))


def plain_loss(
    logits: Tensor,
    targets: Tensor,
    image_size: int,
    input_size: tuple[int, int],
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> tuple[Tensor, Tensor]:
    """Focal and dice loss as DETR and the authors of RefSAM write them, after SAM's two F.interpolate."""
    square = (image_size, image_size)
    x = F.interpolate(logits[:, None], square, mode="bilinear", align_corners=False)
    x = x[..., : input_size[0], : input_size[1]]
    x = F.interpolate(x, targets.shape[1:], mode="bilinear", align_corners=False).flatten(1)
    target = targets.to(x.dtype).flatten(1)
    p = x.sigmoid()
    dice = 1 - (2 * (p * target).sum(1) + 1) / (p.sum(1) + target.sum(1) + 1)
    entropy = F.binary_cross_entropy_with_logits(x, target, reduction="none")
    correct = p * target + (1 - p) * (1 - target)
    focal = entropy * (1 - correct) ** gamma
    focal = focal * (alpha * target + (1 - alpha) * (1 - target))
    return focal.mean(1), dice


@pytest.mark.parametrize(("logits", "image", "cropped", "size"), SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_plain_formula(
    backend: str,
    logits: tuple[int, ...],
    image: int,
    cropped: tuple[int, int],
    size: tuple[int, int],
) -> None:
    """In float32 within 1e-6 of it, gradient included; targets as bool, uint8 and float are the same."""
    x = make_inputs(logits, size)["logits"].float().requires_grad_()
    targets = torch.rand(logits[0], *size, generator=torch.Generator().manual_seed(1)) > 0.8
    wanted = plain_loss(x, targets, image, cropped)
    (wanted_gradient,) = torch.autograd.grad(wanted[0].sum() + wanted[1].sum(), x)
    for dtype in (torch.bool, torch.uint8, torch.float32, torch.float64):
        given_targets = targets.to(dtype)
        found = mask_loss(x, given_targets, image_size=image, input_size=cropped, backend=backend)
        assert all(value.dtype == torch.float32 for value in found)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
        (gradient,) = torch.autograd.grad(found[0].sum() + found[1].sum(), x)
        checks.assert_close("gradient", gradient, wanted_gradient.double(), 1e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_fallback_matches_reference_at_any_size(data: st.DataObject) -> None:
    side = st.integers(1, 30)
    masks = data.draw(st.integers(1, 3))
    shape = (masks, data.draw(side), data.draw(side))
    image = data.draw(st.integers(1, 60))
    cropped = (data.draw(st.integers(1, image)), data.draw(st.integers(1, image)))
    values = make_inputs(shape, (data.draw(st.integers(1, 70)), data.draw(st.integers(1, 70))))
    sizes = {"image_size": image, "input_size": cropped}
    frozen = ("targets",)

    def operator(**arguments: Any) -> tuple[Tensor, Tensor]:
        return mask_loss(**arguments, **sizes)

    found, gradients = checks.run(operator, values, "fallback", frozen)
    wanted, exact = checks.run(operator, values, "reference", frozen)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("elements", [1, 51 * 5, 2 * 37 * 51])
def test_chunks_change_nothing(
    inputs: dict[str, Tensor], elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs, gradients = checks.run(loss, inputs, "fallback", ("targets",))
    monkeypatch.setattr("refsam_kernels.core.chunking.ELEMENTS_ON_CPU", elements)
    found, found_gradients = checks.run(loss, inputs, "fallback", ("targets",))
    torch.testing.assert_close(found, outputs)
    torch.testing.assert_close(found_gradients, gradients)


def test_bands_change_nothing(inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands of 8 output positions, and one over the whole axis as on a GPU."""
    from refsam_kernels.mask_postprocess import resize

    results = []
    for size in (8, resize.WHOLE_AXIS):
        monkeypatch.setitem(resize.BAND_SIZES, "cpu", size)
        resize.two_resizes.cache_clear()
        results.append(checks.run(loss, inputs, "fallback", ("targets",)))
    resize.two_resizes.cache_clear()
    torch.testing.assert_close(*results)


def test_reference_gradients_are_the_derivatives() -> None:
    values = make_inputs((2, 4, 4), (7, 5))

    def function(logits: Tensor) -> tuple[Tensor, Tensor]:
        return mask_loss(
            logits, values["targets"], image_size=16, input_size=(16, 9), backend="reference"
        )

    assert torch.autograd.gradcheck(function, values["logits"].requires_grad_())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ignored", [False, True], ids=["all-pixels", "ignore"])
def test_opcheck(backend: str, ignored: bool) -> None:
    values = make_inputs((2, 5, 4), (6, 7))
    targets = values["targets"] > 0.5
    ignore = values["ignore"] if ignored else None
    arguments = (values["logits"].float(), targets, ignore, 16, [16, 9], 0.25, 2.0, backend)
    checks.check_schema_and_fakes(torch.ops.refsam_kernels.mask_loss.default, arguments)


def test_second_derivative(inputs: dict[str, Tensor]) -> None:
    checks.check_second_derivative_raises(
        loss, inputs | {"targets": inputs["targets"] > 0.5}, "logits"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_low_precision_and_autocast_compute_in_float32(
    inputs: dict[str, Tensor], backend: str, dtype: torch.dtype
) -> None:
    logits = inputs["logits"].to(dtype).requires_grad_()
    targets = inputs["targets"] > 0.5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        focal, dice = loss(logits=logits, targets=targets, backend=backend)
    wanted = plain_loss(logits.detach().float(), targets, 80, (50, 80))
    torch.testing.assert_close((focal.detach(), dice.detach()), wanted, rtol=1e-6, atol=0)
    (focal.sum() + dice.sum()).backward()
    assert logits.grad is not None
    assert logits.grad.dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_loss_alone_has_its_own_gradient(inputs: dict[str, Tensor], backend: str) -> None:
    x = inputs["logits"].requires_grad_()
    targets = inputs["targets"]
    for index in (0, 1):
        wanted = plain_loss(x, targets, 80, (50, 80))[index].sum()
        found = loss(logits=x, targets=targets, backend=backend)[index].sum()
        torch.testing.assert_close(*(torch.autograd.grad(value, x)[0] for value in (found, wanted)))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"logits": torch.zeros(3, 1, 20, 20)}, r"logits: got shape .*, wanted \(P, 4h, 4w\)"),
    "no-expressions": ({"logits": torch.zeros(0, 20, 20)}, "logits: got no expressions, wanted at least one"),
    "integer-logits": ({"logits": torch.zeros(3, 20, 20).long()}, "logits: got torch.int64, wanted a floating point"),
    "empty-logits": ({"logits": torch.zeros(3, 0, 20)}, "logits: got shape .*, wanted no empty mask"),
    "nan": ({"logits": torch.full((3, 20, 20), float("nan"))}, "logits: got 1200 of 1200 values not finite, wanted fin"),
    "targets-count": ({"targets": torch.zeros(2, 37, 51)}, r"targets: got shape \(2, 37, 51\), wanted \(3, H, W\)"),
    "zero-sized": ({"targets": torch.zeros(3, 0, 51)}, r"targets: got shape \(3, 0, 51\), wanted no empty dimension"),
    "targets-dtype": ({"targets": torch.zeros(3, 37, 51).int()}, "targets: got torch.int32, wanted torch.bool, torch"),
    "targets-255": ({"targets": torch.full((3, 37, 51), 255).byte(), "ignore": None}, "targets: got values from 255"),
    "targets-device": ({"targets": torch.zeros(3, 37, 51, device="meta")}, "targets: got meta, wanted cpu as logits"),
    "ignore-shape": ({"ignore": torch.zeros(3, 37, 50).bool()}, r"ignore: got shape .*, wanted \(3, 37, 51\)"),
    "ignore-dtype": ({"ignore": torch.zeros(3, 37, 51)}, "ignore: got torch.float32, wanted torch.bool"),
    "image-size": ({"image_size": 0}, "image_size: got 0, wanted a positive number of pixels"),
    "input-size": ({"input_size": (81, 80)}, r"input_size: got \(81, 80\), wanted at most image_size = 80 each"),
    "empty-input": ({"input_size": (0, 80)}, r"input_size: got \(0, 80\), wanted a positive \(height, width\)"),
    "alpha": ({"alpha": 1.5}, r"alpha: got 1.5, wanted a share in 0..1"),
    "gamma": ({"gamma": -1.0}, "gamma: got -1.0, wanted at least 0"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_rejects(inputs: dict[str, Tensor], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(**(inputs | change), backend=None)
