"""token_image_attention in Triton: both directions against the reference in float64, gradients, padding, bits."""

from typing import Any

import pytest
import torch
from torch import Tensor

from refsam_kernels import BackendError
from refsam_kernels.token_image_attention.outputs import Outputs
from tests.kernels import operator_checks as checks
from tests.kernels.interpreter import DEVICE, DTYPES, IS_INTERPRETED, on_device
from tests.kernels.test_token_image_attention import attention, make_inputs

SIZES = {  # expressions, queries, keys, channels, internal width, heads, expressions of the positions
    "one-of-all": (1, 1, 1, 8, 2, 1, 1),
    "tokens-to-image": (2, 5, 67, 32, 16, 2, 1),
    "image-to-tokens": (2, 35, 5, 32, 16, 2, 1),
    "many-tokens-own-positions": (2, 17, 66, 20, 36, 2, 2),
    "wide-heads": (1, 3, 9, 24, 24, 1, 1),
}
DIRECTIONS = {"to-image": (2, 5, 67), "to-tokens": (2, 19, 5)}


def operator_of(num_heads: int) -> checks.Operator:
    """The operator as a function of its tensors."""

    def operator(**arguments: Any) -> Tensor:
        return attention(num_heads=num_heads, **arguments)

    return on_device(operator)


def padded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """With lengths, of which one leaves out whole tiles of keys."""
    expressions, keys, _ = inputs["keys"].shape
    return inputs | {"key_lengths": torch.tensor([keys, 2])[:expressions].clamp(max=keys)}


@pytest.fixture(params=DIRECTIONS.values(), ids=DIRECTIONS)
def inputs(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    return checks.cast(padded(make_inputs(*request.param, 16, 8, 1)), torch.float32)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    *shape, heads, shared = sizes
    inputs = make_inputs(*shape, shared)
    inputs = padded(inputs) if shape[0] > 1 else inputs
    # k_bias adds the same to all logits of a query, which changes nothing; so do all positions where there is one key.
    single = dict.fromkeys(("query_pe", "key_pe", "q_weight", "q_bias", "k_weight"), "v_weight")
    zero = {"k_bias": "q_bias"} | (single if inputs["keys"].shape[1] == 1 else {})
    checks.check_matches_reference(operator_of(heads), inputs, "triton", dtype, zero=zero)


def test_keeps_what_the_reference_keeps(inputs: dict[str, Tensor]) -> None:
    tensors = [tensor.to(DEVICE) for tensor in inputs.values()]
    operator = torch.ops.refsam_kernels.token_image_attention
    kept = [operator(*tensors, 2, 1e-5, True, name) for name in ("triton", "reference")]
    padding = torch.arange(inputs["keys"].shape[1]) >= inputs["key_lengths"].unsqueeze(1)
    for name, found, wanted in zip(Outputs._fields, *kept, strict=True):
        if name in ("k", "v"):  # anything finite where keys are padding
            assert found.isfinite().all()
            found, wanted = (
                x.masked_fill(padding[:, None].to(DEVICE), 0.0) for x in (found, wanted)
            )
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_padding_changes_no_bit(inputs: dict[str, Tensor]) -> None:
    outputs, gradients = checks.run(operator_of(2), inputs, "triton")
    keys = torch.arange(inputs["keys"].shape[1])
    padding = keys >= inputs["key_lengths"].unsqueeze(1)
    spoiled = inputs | {"keys": inputs["keys"].masked_fill(padding.unsqueeze(-1), float("nan"))}
    found, found_gradients = checks.run(operator_of(2), spoiled, "triton")
    assert torch.equal(found[0], outputs[0])
    assert all(torch.equal(found_gradients[name], gradients[name]) for name in gradients)
    assert not found_gradients["keys"][padding].any()


def test_repeats_bitwise(inputs: dict[str, Tensor]) -> None:
    checks.check_repeats(operator_of(2), inputs, "triton")


def test_checkpoint_and_compile() -> None:
    inputs = checks.cast(padded(make_inputs(*DIRECTIONS["to-tokens"], 16, 8, 1)), torch.float32)
    checks.check_checkpoint(operator_of(2), inputs, "triton")
    checks.check_compiles(operator_of(2), inputs, "triton")


def test_autocast_keeps_the_residual(inputs: dict[str, Tensor]) -> None:
    wanted = operator_of(2)(**inputs, backend="triton")
    with torch.autocast(DEVICE, dtype=torch.float16, enabled=not IS_INTERPRETED):
        found = operator_of(2)(**inputs, backend="triton")
    assert found.dtype == torch.float32
    checks.assert_close("autocast", found, wanted.double(), 2e-2)


def test_no_expressions_below_the_public_function(inputs: dict[str, Tensor]) -> None:
    for name in ("queries", "keys", "query_pe", "key_lengths"):
        inputs[name] = inputs[name][:0]
    for keep in (False, True):
        tensors = (tensor.to(DEVICE) for tensor in inputs.values())
        outputs = torch.ops.refsam_kernels.token_image_attention(*tensors, 2, 1e-5, keep, "triton")
        assert outputs[0].shape == inputs["queries"].shape


def test_refuses_what_it_cannot_compute() -> None:
    for shape, heads, reason in (
        ((1, 65, 66, 8, 2), 1, "at most 64 queries or at most 64 keys, got 65 and more"),
        ((1, 1, 1, 513, 2), 1, "at most 512 channels, got 513"),
        ((1, 1, 1, 8, 258), 2, "heads of at most 128 channels, got 129"),
    ):
        inputs = checks.cast(make_inputs(*shape, 1), torch.float32)
        with pytest.raises(BackendError, match=reason):
            operator_of(heads)(**inputs, backend="triton")
    with pytest.raises(BackendError, match=r"computes float32, .* got torch.float64"):
        operator_of(1)(**make_inputs(1, 1, 1, 8, 2, 1), backend="triton")
