"""adapter_projection in CUDA C++: the kernels are those of adapter_mlp, whose tests say more."""

import pytest
import torch
from torch import Tensor

from refsam_kernels import BackendError
from tests.kernels import operator_checks as checks
from tests.kernels.emulator import DEVICE, DTYPES
from tests.kernels.interpreter import on_device
from tests.kernels.test_adapter_projection import bare, make_inputs
from tests.kernels.test_adapter_projection import operator as on_any_device

SIZES = {  # leading dimensions, width, hidden width of the adapter
    "odd": ((2, 7, 9), 63, 15),
    "one-token": ((1,), 8, 2),
    "several-warps": ((3, 1), 600, 4),
}
operator = on_device(on_any_device)


def small(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return checks.cast(make_inputs((2, 5), 24, 6), dtype)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("adapter", [True, False], ids=["adapter", "bare"])
def test_matches_reference(
    adapter: bool, dtype: torch.dtype, sizes: tuple[tuple[int, ...], int, int]
) -> None:
    inputs = make_inputs(*sizes)
    checks.check_matches_reference(operator, inputs if adapter else bare(inputs), "cuda", dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_untrained_adapter_changes_no_bit(dtype: torch.dtype) -> None:
    inputs = small(dtype)
    for name in ("adapter_fc2_weight", "adapter_fc2_bias"):
        inputs[name].zero_()
    results = [operator(**values, backend="cuda") for values in (inputs, bare(inputs))]
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_inference_gives_the_bits_of_training_and_repeats_them() -> None:
    with torch.no_grad():
        found = operator(**small(), backend="cuda")
    trained, _ = checks.run(operator, small(), "cuda")
    assert all(torch.equal(x, y) for x, y in zip(found, trained, strict=True))
    checks.check_repeats(operator, small(), "cuda")


def test_any_strides() -> None:
    expected, found = (
        operator(**values, backend="cuda") for values in (small(), checks.permuted(small()))
    )
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_empty_batch() -> None:
    outputs, _ = checks.run(operator, checks.cast(make_inputs((0, 3), 8, 2), torch.float32), "cuda")
    assert [tuple(output.shape) for output in outputs] == [(0, 3, 8)] * 2


def test_refuses_what_it_cannot_compute() -> None:
    moved = {name: x.to(DEVICE) for name, x in make_inputs((2,), 8, 2).items()}
    with pytest.raises(BackendError, match="computes float32, bfloat16, float16, got float64"):
        on_any_device(**moved, backend="cuda")
