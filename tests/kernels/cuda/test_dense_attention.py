"""dense_attention in CUDA C++, and the checks that stand in C++."""

import re
from typing import Any

import pytest
import torch

from refsam_kernels.core import libraries
from tests.kernels import operator_checks as checks
from tests.kernels.backend_cases import CudaCases
from tests.kernels.dense_attention_cases import SIZES, DenseAttentionCases, make_inputs
from tests.kernels.emulator import DEVICE


class TestCuda(CudaCases, DenseAttentionCases):
    sizes = SIZES | {
        "several-groups-of-levels": (6, 1, 33, 224, 1, 18),
        "sixteen-rows": (2, 1, 17, 272, 1, 3),
    }

    @pytest.mark.slow
    def test_most_that_it_takes(self, dtype: torch.dtype) -> None:
        inputs = make_inputs(4, 1, 33, 512, 1, 128)
        checks.check_matches_reference(self.operator, inputs, self.backend, dtype)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("features", lambda x: x[0], "features: got 3 dimensions, wanted 4"),
        ("features", lambda x: x.double(), "features: got dtype Double"),
        ("features", lambda x: x.mT.contiguous().mT, "features: got strides of a view"),
        ("features", lambda x: x[:, :0], "features' images: got 0, wanted 1"),
        ("text", lambda x: x[:, :0], "text's words: got 0, wanted 1 to 128"),
        ("text", lambda x: x[..., :3], "text: got size 3 of dimension 2, wanted 16"),
        ("text", lambda x: x.float(), "text: got dtype Float, wanted Half"),
        ("absorbed", lambda x: x[:1], "absorbed: got size 1 of dimension 0, wanted 2"),
        ("lengths", lambda x: x.int(), "lengths: got dtype Int, wanted Long"),
        ("image_index", lambda x: x[:1], "image_index: got size 1 of dimension 0, wanted 2"),
        ("weight", lambda x: x[:, :16], "weight: got size 16 of dimension 1, wanted 32"),
        ("bias", lambda x: x[:3], "bias: got size 3 of dimension 0, wanted 16"),
        ("scale", lambda x: x[None], "scale: got 1 dimensions, wanted 0"),
        ("level_weights", lambda x: x[:1], "level_weights: got size 1 of dimension 0, wanted 2"),
    ],
)
def test_checks_its_arguments_in_cpp(name: str, change: Any, message: str) -> None:
    arguments = {}
    for key, tensor in checks.cast(make_inputs(2, 2, 18, 16, 2, 5), torch.float16).items():
        arguments[key] = tensor.to(DEVICE)
        if key == "text":
            arguments["absorbed"] = arguments["text"].clone()
    arguments[name] = change(arguments[name])
    with pytest.raises(RuntimeError, match=re.escape(message)):
        libraries.load("cuda").dense_attention(*arguments.values())
