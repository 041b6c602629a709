"""rel_pos_attention's fallback on GPUs: torch's attention on augmented queries and keys."""

from unittest import mock

import pytest
import torch
from torch import Tensor

from refsam_kernels.rel_pos_attention import augmented, fallback
from refsam_kernels.rel_pos_attention.inputs import Inputs
from tests.kernels import operator_checks as checks
from tests.kernels.test_rel_pos_attention import CASES, make_inputs, operator_of


def plain_attention(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The formula of torch's kernel, and its conditions."""
    assert queries.shape[-1] == keys.shape[-1] and queries.shape[-1] % augmented.MULTIPLE == 0
    scores = (queries @ keys.mT) * scale
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("pad_mode", ["bias", "mask"])
def test_augmented_queries_and_keys_give_the_same(case: tuple[int, ...], pad_mode: str) -> None:
    tensors = make_inputs(*case).values()
    inputs = Inputs(*tensors, case[3], case[5], pad_mode)
    wanted = fallback.forward(inputs)
    with (
        mock.patch.object(augmented, "is_supported", return_value=True),
        mock.patch.object(augmented, "efficient_attention", plain_attention),
    ):
        found = fallback.forward(inputs)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_serves_cuda_only() -> None:
    assert not augmented.is_supported(torch.zeros(1, 2, 2, 48), num_heads=2)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_torch_s_kernel_matches_reference(case: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = {name: tensor.cuda() for name, tensor in make_inputs(*case).items()}
    zero = {"rel_pos_h": "qkv", "rel_pos_w": "qkv"} if case[1:3] == (1, 1) else {}
    checks.check_matches_reference(operator_of(case), inputs, "fallback", dtype, zero=zero)
