"""token_image_attention in CUDA C++: keys in several parts, and the checks that stand in C++."""

import re
from typing import Any

import pytest
import torch

from refsam_kernels.core import libraries
from tests.kernels import operator_checks as checks
from tests.kernels.backend_cases import CudaCases
from tests.kernels.emulator import DEVICE
from tests.kernels.token_image_attention_cases import (
    REFUSED,
    TO_IMAGE,
    TO_TOKENS,
    ToImageCases,
    ToTokensCases,
)

WIDTHS_OF_SAM = (256, 128, 8, 1, ())


class TestToImage(CudaCases, ToImageCases):
    sizes = TO_IMAGE | {
        "three-parts-of-keys": (2, 24, 264, 24, 32, 2, 1, (264, 2)),
        "many-of-both-own-positions": (2, 65, 66, 20, 36, 2, 2, (66, 2)),
        "odd-widths": (1, 3, 129, 130, 100, 1, 1, ()),
    }
    small = (2, 5, 136, 16, 8, 2, 1, (136, 2))
    refused = REFUSED | {
        "internal": (
            (1, 1, 1, 8, 513, 9, 1, ()),
            torch.float32,
            "at most 512 internal channels, got 513",
        ),
        "heads": (
            (1, 1, 1, 8, 258, 2, 1, ()),
            torch.float32,
            "at most 128 channels in a head, got 129",
        ),
    }

    @pytest.mark.slow
    @pytest.mark.parametrize("counts", [(12, 4160), (4160, 12)], ids=["to-image", "to-tokens"])
    def test_decoder_of_sam(self, counts: tuple[int, int], dtype: torch.dtype) -> None:
        """Its widths, and more keys than the smallest parts could divide."""
        size = (1, *counts, *WIDTHS_OF_SAM)
        inputs = self.make_inputs(size)
        frozen = tuple(inputs)[1:]
        case = (self.operator_of(size), inputs, self.backend, dtype)
        checks.check_matches_reference(*case, frozen)


class TestToTokens(CudaCases, ToTokensCases):
    sizes = TO_TOKENS | {"many-pixels": (2, 72, 5, 32, 16, 2, 1, (5, 2))}
    small = (2, 68, 5, 16, 8, 2, 2, (5, 2))


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
