"""token_image_attention in Triton."""

import torch

from tests.kernels.backend_cases import TritonCases
from tests.kernels.interpreter import slow_in_interpreter
from tests.kernels.token_image_attention_cases import REFUSED, ToImageCases, ToTokensCases


class TestToImage(TritonCases, ToImageCases):
    refused = REFUSED | {
        "many-of-both": (
            (1, 65, 66, 8, 2, 1, 1, ()),
            torch.float32,
            "at most 64 queries, or as many keys, got 65",
        ),
        "heads": (
            (1, 1, 1, 8, 258, 2, 1, ()),
            torch.float32,
            "at most 128 channels in a head, got 129",
        ),
    }

    @slow_in_interpreter
    def test_checkpoint(self) -> None:
        super().test_checkpoint()

    @slow_in_interpreter
    def test_compiles_into_one_graph(self) -> None:
        super().test_compiles_into_one_graph()


class TestToTokens(TritonCases, ToTokensCases):
    pass
