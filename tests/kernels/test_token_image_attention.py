"""token_image_attention: equal to segment-anything's attention blocks, absorbed weights, and its place among torch's tools.

Tests of all backends are in `token_image_attention_cases`.
"""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from refsam_kernels import AttentionWeights, token_image_attention
from refsam_kernels.token_image_attention import fallback
from refsam_kernels.token_image_attention.positions import project_positions
from tests.kernels import operator_checks as checks
from tests.kernels.backend_cases import TorchCases
from tests.kernels.token_image_attention_cases import (
    ToImageCases,
    ToTokensCases,
    attention,
    make_inputs,
)
from tests.sam_modeling import load_sam_modeling, randomise

BACKENDS = ["reference", "fallback"]


class TestReferenceToImage(TorchCases, ToImageCases):
    backend = "reference"


class TestReferenceToTokens(TorchCases, ToTokensCases):
    backend = "reference"


class TestFallbackToImage(TorchCases, ToImageCases):
    backend = "fallback"


class TestFallbackToTokens(TorchCases, ToTokensCases):
    backend = "fallback"


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    return make_inputs(3, 11, 9, 32, 16, 3, (9, 1, 4))


FOLDED = {  # queries, keys, heads, lengths given, dtype; the projection has 16 rows
    "few-queries": (4, 30, 4, False, torch.float64, True),
    "few-keys": (30, 4, 4, True, torch.float32, True),
    "a-quarter-more-rows": (30, 5, 4, True, torch.float64, True),
    "more-rows": (30, 6, 4, True, torch.float64, False),
    "padded-pixels": (4, 30, 4, True, torch.float64, False),
    "half-precision": (30, 4, 4, True, torch.bfloat16, False),
}


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "padded", "dtype", "expected"), FOLDED.values(), ids=FOLDED
)
def test_few_tokens_absorb_the_weights(
    queries: int,
    keys: int,
    heads: int,
    padded: bool,
    dtype: torch.dtype,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the rule says so, without the projections of the pixels; the result is that of the projections."""
    inputs = {name: t.to(dtype) for name, t in make_inputs(3, queries, keys, 32, 16, 1).items()}
    if padded:
        inputs["key_lengths"] = 1 + torch.arange(3) % keys
    rule, answers = fallback.is_cheaper_absorbed, []

    def recorded(*arguments: Any) -> bool:
        answers.append(rule(*arguments))
        return answers[-1]

    monkeypatch.setattr(fallback, "is_cheaper_absorbed", recorded)
    with torch.no_grad():
        found = attention(num_heads=heads, backend="fallback", **inputs)
        monkeypatch.setattr(fallback, "is_cheaper_absorbed", lambda *_: False)
        wanted = attention(num_heads=heads, backend="fallback", **inputs)
    assert answers == [expected]
    assert torch.equal(found, wanted) is not expected
    torch.testing.assert_close(found, wanted)


class Block(nn.Module):
    """The two cross attentions of SAM's block, by this operator, with the weights of segment-anything's."""

    def __init__(self, block: Any, backend: str) -> None:
        super().__init__()
        self.block, self.backend = block, backend

    def attend(self, layer: Any, norm: nn.LayerNorm, *tokens: Tensor) -> Tensor:
        projections = (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj)
        weights = AttentionWeights(*(x for p in projections for x in (p.weight, p.bias)))
        heads, backend = layer.num_heads, self.backend
        return token_image_attention(
            *tokens, weights, norm.weight, norm.bias, num_heads=heads, eps=norm.eps, backend=backend
        )

    def forward(
        self, queries: Tensor, keys: Tensor, query_pe: Tensor, key_pe: Tensor
    ) -> tuple[Tensor, Tensor]:
        block = self.block
        q = queries + query_pe
        queries = block.norm1(queries + block.self_attn(q=q, k=q, v=queries))
        inward = (queries, keys, query_pe, key_pe)
        queries = self.attend(block.cross_attn_token_to_image, block.norm2, *inward)
        queries = block.norm3(queries + block.mlp(queries))
        outward = (keys, queries, key_pe, query_pe)
        return queries, self.attend(block.cross_attn_image_to_token, block.norm4, *outward)


@pytest.mark.parametrize("image_first", [True, False], ids=["channels-first", "channels-last"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_segment_anything(backend: str, image_first: bool) -> None:
    """Bit-equal for `reference`, in both memory layouts that the image tokens have in segment-anything."""
    transformer = load_sam_modeling().transformer
    block = randomise(transformer.TwoWayAttentionBlock(96, 4, mlp_dim=128)).eval()
    torch.manual_seed(1)
    tokens = [torch.randn(2, 9, 96) for _ in range(2)]
    image = [torch.randn(2, 96, 120).mT for _ in range(2)]
    if not image_first:
        image = [x.contiguous() for x in image]
    arguments = (tokens[0], image[0], tokens[1], image[1])
    with torch.no_grad():
        wanted = block(*arguments)
        found = Block(block, backend)(*arguments)
    for got, exact in zip(found, wanted, strict=True):
        if backend == "reference":
            assert torch.equal(got, exact)
        else:
            checks.assert_close("output", got, exact.double(), 1e-5)


def test_chunks_change_nothing(inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    inputs["query_pe"] = inputs["query_pe"][:1]
    outputs, gradients = checks.run(attention, inputs, "fallback")
    monkeypatch.setattr("refsam_kernels.core.chunking.ELEMENTS_ON_CPU", 2 * 11 * 32)
    found, found_gradients = checks.run(attention, inputs, "fallback")
    torch.testing.assert_close(found, outputs)
    torch.testing.assert_close(found_gradients, gradients)


def test_fallback_leaves_out_gradients_that_are_not_wanted(
    inputs: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    checks.check_single_gradients(attention, inputs, "fallback")
    monkeypatch.setattr("refsam_kernels.core.chunking.ELEMENTS_ON_CPU", 11 * 32)
    checks.check_single_gradients(attention, inputs, "fallback")


def test_reference_gradients_are_the_derivatives() -> None:
    inputs = make_inputs(2, 3, 4, 6, 4, 1)
    lengths = torch.tensor([4, 2])

    def function(*tensors: Tensor) -> Tensor:
        named = dict(zip(inputs, tensors, strict=True))
        return attention(**named, key_lengths=lengths, num_heads=2, backend="reference")

    values = [tensor.requires_grad_() for tensor in inputs.values()]
    assert torch.autograd.gradcheck(function, values, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    inputs = checks.cast(make_inputs(2, 3, 4, 6, 4, 1), torch.float32)
    arguments = (*inputs.values(), torch.tensor([4, 2]), 2, 1e-5, True, backend)
    operator = torch.ops.refsam_kernels.token_image_attention.default
    checks.check_schema_and_fakes(operator, arguments)


def test_second_derivative(inputs: dict[str, Tensor]) -> None:
    checks.check_second_derivative_raises(attention, inputs, "q_weight")


def test_autocast_takes_keys_of_another_dtype(inputs: dict[str, Tensor]) -> None:
    """As layers before it leave them: tokens in float32, image features in bfloat16."""
    inputs = checks.cast(inputs, torch.float32)
    inputs["keys"] = inputs["keys"].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attention(**inputs, backend=None)
        wanted = attention(**(inputs | {"keys": inputs["keys"].float()}), backend=None)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_shared_positions_are_projected_once(inputs: dict[str, Tensor]) -> None:
    positions, weight, bias = (inputs[name] for name in ("key_pe", "k_weight", "k_bias"))
    positions = positions[:1].clone()
    first = project_positions(positions, weight, bias, remember=True)
    assert project_positions(positions, weight, bias, remember=True) is first
    assert project_positions(positions, weight, None, remember=True) is not first
    for changed in (positions, weight, bias):
        changed.mul_(2)
        found = project_positions(positions, weight, bias, remember=True)
        expected = torch.nn.functional.linear(positions, weight, bias).mT
        torch.testing.assert_close(found, expected)
    assert project_positions(positions, weight, bias, remember=False) is not found
    with torch.inference_mode():  # its tensors have no versions
        made = [positions * 2, weight * 1]
        twice = [project_positions(*made, None, remember=True) for _ in range(2)]
    assert twice[0] is not twice[1]


def test_remembered_positions_go_with_their_tensors(inputs: dict[str, Tensor]) -> None:
    positions = inputs["key_pe"][:1].clone()
    product = weakref.ref(
        project_positions(positions, inputs["k_weight"], inputs["k_bias"], remember=True)
    )
    gc.collect()
    assert product() is not None
    del positions
    gc.collect()
    assert product() is None


def double(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"queries": double(11, 32)}, r"queries: got shape \(11, 32\), wanted \(P, Tq, C\)"),
    "no-expressions": ({"queries": double(0, 11, 32)}, "queries: got no expressions, wanted at least one"),
    "no-queries": ({"queries": double(3, 0, 32)}, "queries: got no tokens, wanted at least one per expression"),
    "no-words": ({"keys": double(3, 0, 32)}, "keys: got no tokens, wanted at least one per expression"),
    "keys": ({"keys": double(2, 9, 32)}, r"keys: got shape \(2, 9, 32\), wanted \(3, Tk, 32\)"),
    "positions": ({"key_pe": double(3, 8, 32)}, r"key_pe: got shape \(3, 8, 32\), wanted \(P, 9, 32\)"),
    "positions-of-two": ({"query_pe": double(2, 11, 32)}, "query_pe: got 2 expressions, wanted 3 or 1"),
    "dtype": ({"keys": torch.zeros(3, 9, 32)}, "keys: got torch.float32, wanted torch.float64 as queries"),
    "weight-dtype": ({"v_bias": torch.zeros(16)}, "weights.v_bias: got torch.float32, wanted torch.float64 as queries"),
    "weight": ({"k_weight": double(8, 32)}, r"weights.k_weight: got shape \(8, 32\), wanted \(16, 32\)"),
    "out": ({"out_weight": double(16, 32)}, r"weights.out_weight: got shape \(16, 32\), wanted \(32, 16\)"),
    "norm": ({"norm_bias": double(16)}, r"norm_bias: got shape \(16,\), wanted \(32\)"),
    "heads": ({"num_heads": 3}, "num_heads: got 3, wanted a divisor of the internal width 16"),
    "lengths": ({"key_lengths": torch.tensor([1, 2])}, r"key_lengths: got shape \(2,\), wanted \(3\)"),
    "length-0": ({"key_lengths": torch.tensor([1, 0, 9])}, "key_lengths: got values from 0 to 9, wanted values from 1"),
    "int-lengths": ({"key_lengths": torch.ones(3).int()}, "key_lengths: got torch.int32, wanted torch.int64"),
    "device": ({"key_pe": double(3, 9, 32).to("meta")}, "key_pe: got meta, wanted cpu as queries"),
    "weight-device": ({"q_bias": double(16).to("meta")}, "weights.q_bias: got meta, wanted cpu as queries"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_rejects(inputs: dict[str, Tensor], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(**(inputs | change), backend=None)
