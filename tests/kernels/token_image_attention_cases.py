"""Tests that every backend of token_image_attention must pass; a test file makes a class per backend and direction."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from refsam_kernels import AttentionWeights, token_image_attention
from refsam_kernels.token_image_attention.inputs import Outputs
from tests.kernels import operator_checks as checks
from tests.kernels.backend_cases import BackendCases, Size
from tests.kernels.interpreter import on_device

# Expressions, queries, keys, channels, internal width, heads, expressions of the positions, lengths of the keys.
TO_IMAGE: dict[str, Size] = {
    "one-of-all": (1, 1, 1, 8, 2, 1, 1, ()),
    "few-tokens": (2, 5, 67, 32, 16, 2, 1, (67, 2)),
    "many-tokens-own-positions": (2, 17, 66, 20, 36, 2, 2, (66, 2)),
    "wide-heads": (1, 3, 9, 24, 24, 1, 1, ()),
    "all-keys": (3, 7, 66, 32, 16, 4, 1, ()),
}
TO_TOKENS: dict[str, Size] = {
    "few-tokens": (2, 35, 5, 32, 16, 2, 1, (5, 2)),
    "full-width": (2, 5, 5, 24, 24, 3, 2, (5, 1)),
    "all-keys": (3, 20, 7, 32, 16, 4, 3, ()),
}
REFUSED = {
    "channels": (
        (1, 1, 1, 513, 2, 1, 1, ()),
        torch.float32,
        "at most 512 channels, got 513",
    ),
    "dtype": (
        TO_IMAGE["one-of-all"],
        torch.float64,
        "computes float32, float16, bfloat16, got float64",
    ),
}


def attention(*, num_heads: int = 4, backend: str | None, **tensors: Tensor) -> Tensor:
    """The operator with its weights by name."""
    weights = AttentionWeights(*(tensors.pop(name) for name in AttentionWeights._fields))
    return token_image_attention(weights=weights, num_heads=num_heads, backend=backend, **tensors)


def make_inputs(
    expressions: int,
    queries: int,
    keys: int,
    channels: int,
    internal: int,
    shared: int,
    lengths: tuple[int, ...] = (),
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(42)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inward, outward = 2 * channels**-0.5, internal**-0.5
    inputs = {
        "queries": normal(expressions, queries, channels),
        "keys": normal(expressions, keys, channels),
        "query_pe": normal(expressions, queries, channels),
        "key_pe": normal(shared, keys, channels),
        "q_weight": normal(internal, channels) * inward,
        "q_bias": normal(internal),
        "k_weight": normal(internal, channels) * inward,
        "k_bias": normal(internal),
        "v_weight": normal(internal, channels) * inward,
        "v_bias": normal(internal),
        "out_weight": normal(channels, internal) * outward,
        "out_bias": normal(channels),
        "norm_weight": normal(channels),
        "norm_bias": normal(channels),
    }
    return inputs | ({"key_lengths": torch.tensor(lengths)} if lengths else {})


def padding_of(inputs: checks.Inputs) -> Tensor:
    """(P, Tk) bool."""
    return torch.arange(inputs["keys"].shape[1]) >= inputs["key_lengths"].unsqueeze(1)


class TokenImageAttentionCases(BackendCases):
    # Not k_weight: torch multiplies by it in another way where it wants no gradient.
    frozen = (("queries", "key_pe"), ("q_weight", "v_weight", "out_weight"))
    refused = REFUSED

    def operator_of(self, size: Size) -> checks.Operator:
        return on_device(partial(attention, num_heads=size[5]), self.device)

    def make_inputs(self, size: Size) -> dict[str, Tensor]:
        *shape, _, shared, lengths = size
        return make_inputs(*shape, shared, lengths)

    def test_matches_reference(self, size: Size, dtype: torch.dtype) -> None:
        # k_bias adds the same to all logits of a query, which changes nothing; so do all positions where there is one key.
        single = dict.fromkeys(("query_pe", "key_pe", "q_weight", "q_bias", "k_weight"), "v_weight")
        zero = {"k_bias": "q_bias"} | (single if size[2] == 1 else {})
        case = (self.operator_of(size), self.make_inputs(size), self.backend, dtype)
        checks.check_matches_reference(*case, zero=zero)

    def test_keeps_what_the_reference_keeps(self, dtype: torch.dtype) -> None:
        """The backward may run in another backend than the forward."""
        inputs = self.inputs(dtype)
        padding = padding_of(inputs)[:, None]
        tensors = [tensor.to(self.device) for tensor in inputs.values()]
        run = torch.ops.refsam_kernels.token_image_attention
        kept = [
            run(*tensors, self.small[5], 1e-5, True, name) for name in (self.backend, "reference")
        ]
        for name, *pair in zip(Outputs._fields, *kept, strict=True):
            found, wanted = (x.cpu() for x in pair)
            assert found.dtype == wanted.dtype
            if name in ("k", "v"):  # anything finite where keys are padding
                assert found.isfinite().all()
                found, wanted = (x.masked_fill(padding, 0.0) for x in (found, wanted))
            checks.assert_close(name, found, wanted.double(), 4 * checks.TOLERANCES[dtype])

    def test_padding_changes_no_bit(self, dtype: torch.dtype) -> None:
        inputs = self.inputs(dtype)
        padding = padding_of(inputs)
        names = [name for name in ("keys", "key_pe") if len(inputs[name]) == len(padding)]
        spoiled = inputs | {
            name: inputs[name].masked_fill(padding.unsqueeze(-1), float("nan")) for name in names
        }
        outputs, gradients = self.run(inputs)
        found, found_gradients = self.run(spoiled)
        assert torch.equal(found[0], outputs[0])
        for name, gradient in gradients.items():
            assert torch.equal(found_gradients[name], gradient), name
        assert not any(found_gradients[name][padding].any() for name in names)
        with torch.no_grad():
            both = [self.operator(**values, backend=self.backend) for values in (inputs, spoiled)]
        assert torch.equal(*both)

    def test_padding_is_as_if_absent(self) -> None:
        finest = self.dtypes[0]
        inputs = self.inputs(finest)
        padded = self.operator(**inputs, backend=self.backend)
        for i, length in enumerate(inputs.pop("key_lengths").tolist()):
            own = {name: inputs[name][i : i + 1] for name in ("queries", "query_pe", "keys")}
            own["keys"] = own["keys"][:, :length]
            own["key_pe"] = inputs["key_pe"].expand(len(padded), -1, -1)[i : i + 1, :length]
            alone = self.operator(**inputs | own, backend=self.backend)
            checks.assert_close("alone", alone[0], padded[i].double(), checks.TOLERANCES[finest])

    def test_weights_that_change_in_place_are_seen(self) -> None:
        inputs = self.inputs()
        inputs["key_pe"] = inputs["key_pe"][:1].clone()
        del inputs["key_lengths"]  # padding would make new positions
        self.operator(**inputs, backend=self.backend)
        inputs["k_weight"].mul_(3)
        found = self.operator(**inputs, backend=self.backend)
        torch.testing.assert_close(found, self.operator(**inputs, backend="reference"))

    def test_autocast_keeps_the_residual(self, half: torch.dtype) -> None:
        """With projections to zero only the residual is left, which autocast must not round."""
        inputs = self.inputs()
        for name in ("out_weight", "out_bias", "norm_bias"):
            inputs[name].zero_()
        inputs["norm_weight"].fill_(1.0)
        with torch.autocast(self.device, dtype=half):
            found = self.operator(**inputs, backend=self.backend)
        assert found.dtype == torch.float32
        normed = F.layer_norm(inputs["queries"], inputs["queries"].shape[-1:])
        torch.testing.assert_close(found, normed)

    def test_autocast_lowers_the_products(self, half: torch.dtype) -> None:
        outputs, gradients = self.run(self.inputs())
        with torch.autocast(self.device, dtype=half):
            found, found_gradients = self.run(self.inputs())
        assert found[0].dtype == torch.float32
        assert not torch.equal(found[0], outputs[0])
        rounding = checks.TOLERANCES[half]
        checks.assert_close("output", found[0], outputs[0].double(), 5 * rounding)
        assert all(gradient.dtype == torch.float32 for gradient in found_gradients.values())
        keys = found_gradients["keys"], gradients["keys"].double()
        checks.assert_close("keys", *keys, 10 * rounding)

    @pytest.mark.parametrize("keep", [False, True])
    def test_no_expressions_below_the_public_function(self, keep: bool) -> None:
        """The operator itself takes an empty batch: a compiled graph may meet one."""
        inputs = self.inputs()
        of_expressions = ["queries", "keys", "query_pe", "key_lengths"]
        for name in of_expressions + ["key_pe"] * (len(inputs["key_pe"]) > 1):
            inputs[name] = inputs[name][:0]
        tensors = (tensor.to(self.device) for tensor in inputs.values())
        options = (self.small[5], 1e-5, keep, self.backend)
        outputs = torch.ops.refsam_kernels.token_image_attention(*tensors, *options)
        assert outputs[0].shape == inputs["queries"].shape


class ToImageCases(TokenImageAttentionCases):
    sizes = TO_IMAGE
    small = (2, 5, 67, 16, 8, 2, 1, (67, 2))


class ToTokensCases(TokenImageAttentionCases):
    sizes = TO_TOKENS
    small = (2, 19, 5, 16, 8, 2, 2, (5, 2))
