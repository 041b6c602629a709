"""Tests that every backend of dense_attention must pass; a test file makes a class of them per backend."""

import torch
import torch.nn.functional as F
from torch import Tensor

from refsam_kernels import dense_attention
from tests.kernels import operator_checks as checks
from tests.kernels.backend_cases import BackendCases, Size

SIZES: dict[str, Size] = {  # levels, images, pixels, channels, expressions, words
    "one-of-all": (1, 1, 1, 1, 1, 1),
    "one-image": (3, 1, 18, 20, 2, 7),
    "several-images": (2, 3, 35, 66, 3, 17),
    "more-images-than-expressions": (4, 5, 13, 8, 2, 3),
}
REFUSED = {
    "channels": ((1, 1, 2, 513, 1, 1), torch.float32, "at most 512 channels, got 513"),
    "words": ((1, 1, 2, 4, 1, 129), torch.float32, "at most 128 words, got 129"),
    "dtype": (
        SIZES["one-of-all"],
        torch.float64,
        "computes float32, float16, bfloat16, got float64",
    ),
}
OF_EXPRESSIONS = ("text", "lengths", "image_index")


def make_inputs(
    levels: int, images: int, pixels: int, channels: int, expressions: int, words: int
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(42)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return {
        "features": F.normalize(normal(levels, images, pixels, channels), dim=-1),
        "text": F.normalize(normal(expressions, words, channels), dim=-1),
        "lengths": torch.randint(1, words + 1, (expressions,), generator=generator),
        "image_index": torch.randint(images, (expressions,), generator=generator),
        "weight": normal(channels, 2 * channels) / channels**0.5,
        "bias": normal(channels),
        "scale": torch.tensor(7.0, dtype=torch.float64),
        "level_weights": 1.3 * normal(levels).softmax(dim=0),  # the operator takes any
    }


class DenseAttentionCases(BackendCases):
    sizes = SIZES
    small = (2, 2, 18, 16, 2, 5)
    frozen = (("features",),)
    refused = REFUSED
    function = staticmethod(dense_attention)

    def make_inputs(self, size: Size) -> dict[str, Tensor]:
        return make_inputs(*size)

    def test_padding_changes_no_bit(self, dtype: torch.dtype) -> None:
        inputs = self.inputs(dtype)
        padding = torch.arange(inputs["text"].shape[1]) >= inputs["lengths"].unsqueeze(1)
        assert padding.any()
        outputs, gradients = self.run(inputs)
        text = inputs["text"].masked_fill(padding.unsqueeze(-1), float("nan"))
        found, found_gradients = self.run(inputs | {"text": text})
        assert torch.equal(found[0], outputs[0])
        assert all(torch.equal(found_gradients[name], gradients[name]) for name in gradients)
        assert not found_gradients["text"][padding].any()

    def test_expression_does_not_depend_on_the_others(self, dtype: torch.dtype) -> None:
        inputs = self.inputs(dtype)
        together = self.operator(**inputs, backend=self.backend)
        for i in range(len(together)):
            own = {name: inputs[name][i : i + 1] for name in OF_EXPRESSIONS}
            alone = self.operator(**inputs | own, backend=self.backend)
            tolerance = checks.TOLERANCES[dtype]
            checks.assert_close("alone", alone[0], together[i].double(), tolerance)

    def test_scale_and_shares_of_another_dtype(self, half: torch.dtype) -> None:
        inputs = self.inputs(half)
        inputs["scale"] = inputs["scale"].bfloat16()
        inputs["level_weights"] = inputs["level_weights"].float()
        exact = self.operator(**checks.cast(inputs, torch.float64), backend="reference")
        found = self.operator(**inputs, backend=self.backend)
        assert found.dtype == half
        checks.assert_close("dense", found, exact, 2 * checks.TOLERANCES[half])  # two roundings

    def test_autocast_lowers_the_products(self, half: torch.dtype) -> None:
        full = self.operator(**self.inputs(), backend=self.backend)
        with torch.autocast(self.device, dtype=half):
            lowered = self.operator(**self.inputs(), backend=self.backend)
        assert lowered.dtype == half
        checks.assert_close("autocast", lowered, full.double(), 5 * checks.TOLERANCES[half])

    def test_no_expressions_below_the_public_function(self) -> None:
        """The operator itself takes an empty batch: a compiled graph may meet one."""
        inputs = self.inputs()
        inputs |= {name: inputs[name][:0] for name in OF_EXPRESSIONS}
        tensors = (tensor.to(self.device) for tensor in inputs.values())
        dense = torch.ops.refsam_kernels.dense_attention(*tensors, self.backend)
        assert dense.shape == (0, *inputs["features"].shape[2:])
