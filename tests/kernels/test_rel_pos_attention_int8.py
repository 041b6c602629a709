"""rel_pos_attention(int8_scores=True): its definition, every instruction set, values that are not finite, and torch's tools."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from refsam_kernels import BackendError, flop_formulas, rel_pos_attention
from refsam_kernels.rel_pos_attention.int8.reference import rounded
from tests.kernels.rel_pos_attention_cases import Case, make_inputs

HALF_OF_THE_STEPS = ("avx2", "avx512")
SIZES: dict[str, Case] = {
    "windows-with-padding": (1, 16, 15, 2, 16, 14),
    "several-blocks-of-keys": (1, 24, 22, 1, 40, 0),
    "odd-head-dim": (2, 5, 7, 2, 13, 0),
    "rows-longer-than-a-block": (1, 2, 540, 1, 8, 0),
}


def arguments(sizes: Case, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return make_inputs(*sizes, dtype) | {"num_heads": sizes[3], "window_size": sizes[5]}


def attend(arguments: dict[str, Any], **options: Any) -> Tensor:
    with torch.no_grad():
        return rel_pos_attention(**(arguments | {"int8_scores": True} | options))


def exact(arguments: dict[str, Any], **options: Any) -> Tensor:
    """The attention in float64, nothing rounded."""
    wide = {k: v.double() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    return attend(wide, int8_scores=False, backend="reference", **options)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("pad_mode", ["bias", "mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_is_the_definition(
    int8_backend: str, sizes: Case, dtype: torch.dtype, pad_mode: str
) -> None:
    """To float32's rounding, or bfloat16's in probabilities and result; and near the exact attention."""
    given = arguments(sizes, dtype)
    found = attend(given, pad_mode=pad_mode)
    assert found.dtype == dtype
    few = int8_backend in HALF_OF_THE_STEPS
    # Measured: 0.0068 with 127 steps on either side, 0.0137 with 63.
    assert error(found, exact(given, pad_mode=pad_mode)) < (0.02 if few else 0.01)
    if not few:
        wanted = attend(given, pad_mode=pad_mode, backend="reference")
        # Now and then a value is rounded to another integer: it makes 7e-5.
        assert error(found, wanted) < (3e-4 if dtype == torch.float32 else 4e-3)


def test_whole_numbers_are_exact(int8_backend: str) -> None:
    """Queries and keys of whole numbers whose largest is 63 or 127 have steps of 1: no rounding is left."""
    given = arguments((1, 4, 5, 1, 24, 0))
    largest = 63 if int8_backend in HALF_OF_THE_STEPS else 127
    whole = torch.randint(
        -largest, largest + 1, (1, 4, 5, 48), generator=torch.Generator().manual_seed(0)
    )
    whole[..., 0], whole[..., 24] = largest, -largest
    given["qkv"][..., :48] = whole
    scale = 1e-4  # so that the softmax is no choice of one key
    given["qkv"][..., :24] *= scale
    given["qkv_bias"] = None
    assert error(attend(given), exact(given)) < 1e-5


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_stay_in_their_window(int8_backend: str, value: float) -> None:
    given = arguments((1, 4, 8, 2, 8, 4))
    clean = attend(given)
    for part, reached in ((0, 1), (1, 16)):  # a query's own token; a key's whole window
        hit = given | {"qkv": given["qkv"].clone()}
        hit["qkv"][0, 1, 2, part * 16 + 3] = value
        found = attend(hit)
        is_nan = found.isnan().any(-1)
        assert int(is_nan.sum()) == reached and bool(is_nan[0, 1, 2])
        assert found[..., :8][is_nan].isnan().all()  # of the head that was hit
        assert torch.equal(found[..., 8:], clean[..., 8:])
        assert torch.equal(found[~is_nan], clean[~is_nan])


def test_queries_and_keys_of_zeros(int8_backend: str) -> None:
    given = arguments((1, 3, 3, 1, 8, 0)) | {"qkv_bias": None}
    given["qkv"][..., :16] = 0
    mean = given["qkv"][..., 16:].mean((1, 2), keepdim=True).expand(-1, 3, 3, -1)
    torch.testing.assert_close(attend(given), mean)


def test_layouts_and_threads_do_not_change_a_bit(int8_backend: str) -> None:
    given = arguments((2, 9, 8, 2, 12, 0))
    wanted = attend(given)
    qkv = given["qkv"]
    wide = torch.cat([qkv, torch.full_like(qkv, float("nan"))], -1)[..., : qkv.shape[-1]]
    for view in (wide, qkv.transpose(1, 2).contiguous().transpose(1, 2), qkv.mT.contiguous().mT):
        assert torch.equal(attend(given | {"qkv": view}), wanted)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(attend(given), wanted)
    finally:
        torch.set_num_threads(before)
    assert attend(given | {"qkv": qkv[:0]}).shape == (0, 9, 8, 24)


def test_steps_are_those_of_the_largest_value() -> None:
    tokens = torch.tensor([[1.27, 0.004, -0.006], [0, 0, 0], [1, float("inf"), 0]])
    found = rounded(tokens)
    torch.testing.assert_close(found[0], torch.tensor([1.27, 0, -0.01]))
    assert torch.equal(found[1], torch.zeros(3)) and found[2].isnan().all()


def test_opcheck() -> None:
    given = arguments((1, 4, 5, 2, 8, 3))
    operator = torch.ops.refsam_kernels.rel_pos_attention_int8.default
    for pad_mode in ("bias", "mask"):
        torch.library.opcheck(operator, (*given.values(), pad_mode, ""))


def test_is_one_node_of_a_graph() -> None:
    given = arguments((1, 3, 4, 1, 8, 0))
    qkv = given.pop("qkv")
    compiled = torch.compile(lambda x: attend({"qkv": x} | given), fullgraph=True, backend="eager")
    assert torch.equal(compiled(qkv), attend({"qkv": qkv} | given))


def test_what_it_refuses() -> None:
    given = arguments((1, 3, 4, 1, 8, 0))
    with pytest.raises(RuntimeError, match="rel_pos_attention: got int8_scores with tensors that"):
        rel_pos_attention(**given | {"qkv": given["qkv"].requires_grad_()}, int8_scores=True)
    with pytest.raises(BackendError, match="has no triton backend"):
        attend(arguments((1, 3, 4, 1, 8, 0)), backend="triton")


def test_products_are_counted_as_in_floats() -> None:
    given = arguments((1, 3, 4, 1, 8, 0))
    counts = []
    for int8_scores in (False, True):
        with FlopCounterMode(display=False, custom_mapping=flop_formulas()) as counter:
            attend(given, int8_scores=int8_scores)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
