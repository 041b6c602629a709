"""mask_loss in Triton: losses and gradients of any size against the reference in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from refsam_kernels import BackendError, mask_loss
from tests.kernels import operator_checks as checks
from tests.kernels.interpreter import DEVICE, on_device

SIZES = {  # logits, image_size, input_size, targets; the last tiles of both kernels are cut
    "odd": ((2, 20, 18), 80, (50, 80), (37, 51)),
    "portrait": ((1, 17, 33), 64, (64, 43), (40, 150)),
    "shrinking": ((2, 33, 27), 70, (70, 9), (5, 3)),
    "one-pixel": ((1, 1, 1), 1, (1, 1), (1, 1)),
}


def make_inputs(logits: tuple[int, ...], targets: tuple[int, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(42)
    shape = (logits[0], *targets)
    return {
        "logits": 6 * torch.randn(logits, generator=generator),
        "targets": torch.rand(shape, generator=generator),
        "ignore": torch.rand(shape, generator=generator) > 0.7,
    }


def operator_of(image_size: int, input_size: tuple[int, int], **settings: Any) -> checks.Operator:
    """The operator as a function of its tensors."""

    def loss(**arguments: Any) -> tuple[Tensor, Tensor]:
        return mask_loss(image_size=image_size, input_size=input_size, **settings, **arguments)

    return on_device(loss)


def check(operator: checks.Operator, inputs: dict[str, Tensor]) -> None:
    """Losses within 1e-6 of the reference in float64; the gradient by the rule of three times the plain formula's error."""
    found, gradients = checks.run(operator, inputs, "triton", ("targets",))
    exact, wanted = checks.run(
        operator, checks.cast(inputs, torch.float64), "reference", ("targets",)
    )
    _, eager = checks.run(operator, inputs, "reference", ("targets",))
    for got, value in zip(found, exact, strict=True):
        torch.testing.assert_close(got.double(), value, rtol=1e-6, atol=0)
    values = (x["logits"] for x in (gradients, wanted, eager))
    checks.assert_as_good_as_eager("gradient", *values, wanted["logits"], torch.float32, factor=3)


@pytest.mark.parametrize(("logits", "image", "cropped", "size"), SIZES.values(), ids=SIZES)
def test_matches_reference(
    logits: tuple[int, ...], image: int, cropped: tuple[int, int], size: tuple[int, int]
) -> None:
    check(operator_of(image, cropped), make_inputs(logits, size))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 3.3])
def test_any_exponent(gamma: float) -> None:
    check(operator_of(32, (32, 20), gamma=gamma, alpha=0.4), make_inputs((1, 8, 8), (9, 11)))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float16, torch.float64], ids=str)
def test_targets_of_every_dtype_are_the_same(dtype: torch.dtype) -> None:
    inputs = make_inputs((2, 8, 8), (9, 11))
    inputs["targets"] = (inputs["targets"] > 0.5).float()
    inputs["ignore"] = inputs["ignore"].mT.contiguous().mT  # any strides
    outputs = operator_of(32, (32, 20))(**inputs, backend="triton")
    inputs["targets"] = inputs["targets"].to(dtype)
    assert all(map(torch.equal, operator_of(32, (32, 20))(**inputs, backend="triton"), outputs))


def test_sure_pixels_lose_what_they_should() -> None:
    """1 + exp(-15) and 1 - sigmoid(15) round away four digits of float32; nothing of it may reach the loss."""
    inputs = {"logits": torch.full((1, 4, 4), 15.0), "targets": torch.ones(1, 4, 4)}
    operator = operator_of(4, (4, 4))
    found = operator(**inputs, backend="triton")[0]
    exact = 0.25 * torch.tensor([15.0]).double().sigmoid().neg().add(1).square()
    exact *= torch.nn.functional.softplus(torch.tensor([-15.0]).double())
    torch.testing.assert_close(found.double(), exact, rtol=5e-6, atol=0)


def test_ignored_pixels_may_be_nan() -> None:
    inputs = make_inputs((2, 8, 8), (9, 11))
    operator = operator_of(32, (32, 20))
    outputs, gradients = checks.run(operator, inputs, "triton", ("targets",))
    inputs["targets"] = inputs["targets"].masked_fill(inputs["ignore"], float("nan"))
    found, found_gradients = checks.run(operator, inputs, "triton", ("targets",))
    assert all(map(torch.equal, found, outputs))
    assert torch.equal(found_gradients["logits"], gradients["logits"])


def test_repeats_bitwise() -> None:
    inputs = make_inputs((2, 17, 8), (9, 33))
    checks.check_repeats(
        operator_of(32, (32, 20)), inputs | {"targets": inputs["targets"] > 0.5}, "triton"
    )


def test_checkpoint_and_compile() -> None:
    inputs = make_inputs((1, 8, 8), (9, 11))
    inputs["targets"] = inputs["targets"] > 0.5
    checks.check_checkpoint(operator_of(32, (32, 20)), inputs, "triton")
    inputs = {name: x[:, :1, :1] for name, x in inputs.items()}
    checks.check_compiles(operator_of(32, (32, 20)), inputs, "triton")


def test_refuses_what_it_cannot_compute() -> None:
    inputs = {name: x.to(DEVICE) for name, x in make_inputs((1, 64, 64), (40, 40)).items()}
    with pytest.raises(BackendError, match=r"computes float32, got torch\.float64"):
        mask_loss(
            inputs["logits"].double(),
            inputs["targets"],
            image_size=64,
            input_size=(64, 64),
            backend="triton",
        )
    with pytest.raises(BackendError, match="needs resizes of at most 8 taps, these have"):
        mask_loss(
            inputs["logits"], inputs["targets"], image_size=4, input_size=(4, 4), backend="triton"
        )
