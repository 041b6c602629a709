"""dense_attention in Triton: any sizes against the reference in float64, gradients, padding, bits."""

import pytest
import torch
from torch import Tensor

from refsam_kernels import BackendError, dense_attention
from tests.kernels import operator_checks as checks
from tests.kernels.interpreter import DEVICE, DTYPES, on_device
from tests.kernels.test_dense_attention import make_inputs

SIZES = {  # levels, images, pixels, channels, expressions, words
    "one-of-all": (1, 1, 1, 1, 1, 1),
    "one-image": (3, 1, 18, 20, 2, 7),
    "several-images": (2, 3, 35, 66, 3, 17),
}
operator = on_device(dense_attention)


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    return checks.cast(make_inputs(2, 2, 18, 16, 2, 5), torch.float32)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    checks.check_matches_reference(operator, make_inputs(*sizes), "triton", dtype)


def test_padding_changes_no_bit(inputs: dict[str, Tensor]) -> None:
    padding = torch.arange(5) >= inputs["lengths"].unsqueeze(1)
    outputs, gradients = checks.run(operator, inputs, "triton")
    poisoned = {**inputs, "text": inputs["text"].masked_fill(padding.unsqueeze(-1), float("nan"))}
    found, found_gradients = checks.run(operator, poisoned, "triton")
    assert torch.equal(found[0], outputs[0])
    assert all(torch.equal(found_gradients[name], gradients[name]) for name in gradients)
    assert not found_gradients["text"][padding].any()


def test_leaves_out_the_features_gradient_where_it_is_not_wanted(
    inputs: dict[str, Tensor],
) -> None:
    _, together = checks.run(operator, inputs, "triton")
    _, found = checks.run(operator, inputs, "triton", frozen=("features",))
    assert found.keys() == together.keys() - {"features"}
    assert all(torch.equal(found[name], together[name]) for name in found)


def test_repeats_bitwise(inputs: dict[str, Tensor]) -> None:
    checks.check_repeats(operator, inputs, "triton")


def test_any_strides(inputs: dict[str, Tensor]) -> None:
    outputs, gradients = checks.run(operator, inputs, "triton")
    found, found_gradients = checks.run(operator, checks.permuted(inputs), "triton")
    torch.testing.assert_close(found, outputs)
    torch.testing.assert_close(found_gradients, gradients)


def test_checkpoint_and_compile(inputs: dict[str, Tensor]) -> None:
    checks.check_checkpoint(operator, inputs, "triton")
    checks.check_compiles(operator, inputs, "triton")


def test_autocast(inputs: dict[str, Tensor]) -> None:
    full = operator(**inputs, backend="triton")
    with torch.autocast(DEVICE, dtype=torch.float16):
        lowered = operator(**inputs, backend="triton")
    assert lowered.dtype == torch.float16
    checks.assert_close("autocast", lowered, full.double(), 1e-2)


def test_no_expressions_below_the_public_function(inputs: dict[str, Tensor]) -> None:
    names = ("text", "lengths", "image_index")
    inputs = inputs | {name: inputs[name][:0] for name in names}
    tensors = (tensor.to(DEVICE) for tensor in inputs.values())
    dense = torch.ops.refsam_kernels.dense_attention(*tensors, "triton")
    assert dense.shape == (0, 18, 16)


def test_refuses_what_it_cannot_compute() -> None:
    for sizes, reason in (
        ((1, 1, 2, 513, 1, 1), "at most 512 channels, got 513"),
        ((1, 1, 2, 4, 1, 129), "at most 128 words, got 129"),
    ):
        inputs = checks.cast(make_inputs(*sizes), torch.float32)
        with pytest.raises(BackendError, match=reason):
            operator(**inputs, backend="triton")
    with pytest.raises(BackendError, match=r"computes float32, .* got torch.float64"):
        operator(**make_inputs(1, 1, 2, 4, 1, 1), backend="triton")
