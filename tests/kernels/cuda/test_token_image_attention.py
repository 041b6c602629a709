"""token_image_attention in CUDA C++: both directions against the reference in float64, split keys, padding, bits."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from refsam_kernels import BackendError, libraries
from refsam_kernels.token_image_attention.outputs import Outputs
from tests.kernels import operator_checks as checks
from tests.kernels.emulator import DEVICE, DTYPES
from tests.kernels.interpreter import on_device
from tests.kernels.test_token_image_attention import attention, make_inputs

SIZES = {  # expressions, queries, keys, channels, internal width, heads, expressions of the positions
    "one-of-all": (1, 1, 1, 8, 2, 1, 1),
    "tokens-to-image": (2, 5, 67, 32, 16, 2, 1),
    "three-parts-of-keys": (2, 24, 264, 24, 32, 2, 1),
    "image-to-tokens": (2, 72, 5, 32, 16, 2, 1),
    "many-of-both-own-positions": (2, 65, 66, 20, 36, 2, 2),
    "wide-heads": (1, 3, 129, 130, 100, 1, 1),
}
DIRECTIONS = {"to-image": (2, 5, 136), "to-tokens": (2, 68, 5)}


def operator_of(num_heads: int) -> checks.Operator:
    """The operator as a function of its tensors."""

    def operator(**arguments: Any) -> Tensor:
        return attention(num_heads=num_heads, **arguments)

    return on_device(operator)


def padded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """With lengths, of which one leaves out whole parts of the keys."""
    expressions, keys, _ = inputs["keys"].shape
    return inputs | {"key_lengths": torch.tensor([keys, 2])[:expressions].clamp(max=keys)}


@pytest.fixture(params=DIRECTIONS.values(), ids=DIRECTIONS)
def inputs(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    return checks.cast(padded(make_inputs(*request.param, 16, 8, 1)), torch.float16)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    *shape, heads, shared = sizes
    inputs = make_inputs(*shape, shared)
    inputs = padded(inputs) if shape[0] > 1 else inputs
    # k_bias adds the same to all logits of a query, which changes nothing; so do all positions where there is one key.
    single = dict.fromkeys(("query_pe", "key_pe", "q_weight", "q_bias", "k_weight"), "v_weight")
    zero = {"k_bias": "q_bias"} | (single if inputs["keys"].shape[1] == 1 else {})
    checks.check_matches_reference(operator_of(heads), inputs, "cuda", dtype, zero=zero)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoder_of_sam(dtype: torch.dtype) -> None:
    """Its widths, and more keys than the smallest parts could divide."""
    for queries, keys in ((12, 4160), (4160, 12)):
        inputs = make_inputs(1, queries, keys, 256, 128, 1)
        frozen = tuple(inputs)[1:]
        checks.check_matches_reference(operator_of(8), inputs, "cuda", dtype, frozen)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keeps_what_the_reference_keeps(inputs: dict[str, Tensor], dtype: torch.dtype) -> None:
    tensors = [tensor.to(DEVICE) for tensor in checks.cast(inputs, dtype).values()]
    operator = torch.ops.refsam_kernels.token_image_attention
    kept = [operator(*tensors, 2, 1e-5, True, name) for name in ("cuda", "reference")]
    padding = torch.arange(inputs["keys"].shape[1]) >= inputs["key_lengths"].unsqueeze(1)
    tolerance = 4 * checks.TOLERANCES[dtype]
    for name, found, wanted in zip(Outputs._fields, *kept, strict=True):
        assert found.dtype == wanted.dtype
        if name in ("k", "v"):  # anything finite where keys are padding
            assert found.isfinite().all()
            found, wanted = (
                x.masked_fill(padding[:, None].to(DEVICE), 0.0) for x in (found, wanted)
            )
        checks.assert_close(name, found, wanted.double(), tolerance)


def test_padding_changes_no_bit(inputs: dict[str, Tensor]) -> None:
    outputs, gradients = checks.run(operator_of(2), inputs, "cuda")
    padding = torch.arange(inputs["keys"].shape[1]) >= inputs["key_lengths"].unsqueeze(1)
    spoiled = inputs | {"keys": inputs["keys"].masked_fill(padding.unsqueeze(-1), float("nan"))}
    found, found_gradients = checks.run(operator_of(2), spoiled, "cuda")
    assert torch.equal(found[0], outputs[0])
    assert all(torch.equal(found_gradients[name], gradients[name]) for name in gradients)
    with torch.no_grad():
        assert torch.equal(operator_of(2)(**spoiled, backend="cuda"), outputs[0])


def test_repeats_bitwise(inputs: dict[str, Tensor]) -> None:
    checks.check_repeats(operator_of(2), inputs, "cuda")


def test_any_strides_and_checkpoint() -> None:
    inputs = checks.cast(padded(make_inputs(*DIRECTIONS["to-tokens"], 16, 8, 1)), torch.float32)
    checks.check_checkpoint(operator_of(2), inputs, "cuda")
    expected, found = (
        operator_of(2)(**values, backend="cuda") for values in (inputs, checks.permuted(inputs))
    )
    torch.testing.assert_close(found, expected)


def test_autocast_keeps_the_residual(inputs: dict[str, Tensor]) -> None:
    inputs = checks.cast(inputs, torch.float32)
    wanted = operator_of(2)(**inputs, backend="cuda")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = operator_of(2)(**inputs, backend="cuda")
    assert found.dtype == torch.float32
    checks.assert_close("autocast", found, wanted.double(), 5e-2)


def test_no_expressions_below_the_public_function(inputs: dict[str, Tensor]) -> None:
    for name in ("queries", "keys", "query_pe", "key_lengths"):
        inputs[name] = inputs[name][:0]
    for keep in (False, True):
        tensors = (tensor.to(DEVICE) for tensor in inputs.values())
        outputs = torch.ops.refsam_kernels.token_image_attention(*tensors, 2, 1e-5, keep, "cuda")
        assert outputs[0].shape == inputs["queries"].shape


def test_refuses_what_it_cannot_compute() -> None:
    for shape, heads, reason in (
        ((1, 1, 1, 513, 2), 1, "at most 512 channels, got 513"),
        ((1, 1, 1, 8, 513), 9, "at most 512 internal channels, got 513"),
        ((1, 1, 1, 8, 258), 2, "at most 128 channels in a head, got 129"),
    ):
        inputs = checks.cast(make_inputs(*shape, 1), torch.float32)
        with pytest.raises(BackendError, match=reason):
            operator_of(heads)(**inputs, backend="cuda")
    with pytest.raises(BackendError, match=r"computes float32, .* got torch.float64"):
        operator_of(1)(**make_inputs(1, 1, 1, 8, 2, 1), backend="cuda")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q", lambda x: x[0], "q: got 2 dimensions, wanted 3"),
        ("q", lambda x: x.double(), "q: got dtype Double"),
        ("q", lambda x: x[:, :, :0], "q's queries: got 0, wanted 1"),
        ("k", lambda x: x[:, :5], "k: got size 5 of dimension 1, wanted 6"),
        ("k", lambda x: x.half(), "k: got dtype Half, wanted Float"),
        ("v", lambda x: x[:, :, 1:], "v: got size 6 of dimension 2, wanted 7"),
        ("v", lambda x: x.mT.contiguous().mT, "v: got strides of a view"),
        ("residual", lambda x: x[:1], "residual: got size 1 of dimension 0, wanted 2"),
        ("out_weight", lambda x: x[1:], "out_weight: got size 9 of dimension 0, wanted 10"),
        ("added", lambda x: x[1:], "added: got size 9 of dimension 0, wanted 10"),
        ("norm_weight", lambda x: x.int(), "norm_weight: got dtype Int"),
        ("norm_bias", lambda x: x[None], "norm_bias: got 2 dimensions, wanted 1"),
        ("key_lengths", lambda x: x.int(), "key_lengths: got dtype Int, wanted Long"),
        ("num_heads", lambda x: 4, "num_heads: got 4, wanted a divisor of the internal width 6"),
    ],
)
def test_checks_its_arguments_in_cpp(name: str, change: Any, message: str) -> None:
    shapes = {"q": (2, 6, 3), "k": (2, 6, 7), "v": (2, 6, 7), "residual": (2, 3, 10)}
    shapes |= {"out_weight": (10, 6)} | dict.fromkeys(("added", "norm_weight", "norm_bias"), (10,))
    arguments: dict[str, Any] = {
        name: torch.zeros(shape, device=DEVICE) for name, shape in shapes.items()
    }
    arguments |= {"key_lengths": torch.ones(2, dtype=torch.int64, device=DEVICE), "num_heads": 2}
    arguments |= {"eps": 1e-5, "keep": True}
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=re.escape(message)):
        libraries.load("cuda").token_image_attention(*arguments.values())
