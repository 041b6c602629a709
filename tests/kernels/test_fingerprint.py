"""Weights that change behind torch's count of versions: what was packed of them is made anew."""

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from refsam_kernels import Fingerprint
from refsam_kernels.integrations import optimize
from refsam_kernels.token_image_attention.positions import project_positions
from tests.kernels.test_integrations import (
    assert_close,
    each_encoder,
    features,
    pixels_of,
    sam_encoder,
)

Change = Callable[[list[Tensor]], None]


def multiply(parameters: list[Tensor]) -> None:
    for parameter in parameters:
        parameter.data.mul_(0.9)


def multiply_together(parameters: list[Tensor]) -> None:
    torch._foreach_mul_([parameter.data for parameter in parameters], 0.9)


def follow_a_student(parameters: list[Tensor]) -> None:
    """A mean teacher's step."""
    for parameter in parameters:
        student = parameter.detach() + 0.1
        parameter.data = parameter.data.mul_(0.99).add_(student, alpha=0.01)


def copy_into(parameters: list[Tensor]) -> None:
    for parameter in parameters:
        parameter.data.copy_(parameter.detach() + 0.01)


def through_numpy(parameters: list[Tensor]) -> None:
    for parameter in parameters:
        values = parameter.detach().numpy()
        values *= 0.9


def negate(parameters: list[Tensor]) -> None:
    for parameter in parameters:
        parameter.data.neg_()


CHANGES: dict[str, Change] = {
    change.__name__: change
    for change in (multiply, multiply_together, follow_a_student, copy_into, through_numpy, negate)
}
each_change = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


@each_encoder
@each_change
@torch.no_grad()
def test_an_optimized_model_computes_with_the_values_of_now(
    make: Callable[..., nn.Module], change: Change
) -> None:
    model, pixels = make(), pixels_of()
    plain = copy.deepcopy(model)
    optimize(model)
    before = features(model, pixels)
    for changed in (model, plain):
        change(list(changed.parameters()))
    found = features(model, pixels)
    assert_close(found, features(plain, pixels))
    assert (found - before).abs().max() > 1e-3 * before.abs().max()  # the change can be seen


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "strategy", [ShardingStrategy.NO_SHARD, ShardingStrategy.FULL_SHARD], ids=str
)
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_training_with_fsdp_flat_parameters(
    process_group: None, use_orig_params: bool, strategy: ShardingStrategy
) -> None:
    original, pixels = sam_encoder(), pixels_of()

    def trained(optimized: bool) -> Tensor:
        model: Any = copy.deepcopy(original)
        if optimized:
            optimize(model)
        model = FullyShardedDataParallel(
            model,
            sharding_strategy=strategy,
            use_orig_params=use_orig_params,
            device_id=torch.device("cpu"),
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        for _ in range(2):
            with torch.no_grad():
                model(pixels)
            model(pixels).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            return model(pixels)

    assert_close(trained(optimized=True), trained(optimized=False), 1e-4)


@each_change
@torch.no_grad()
def test_remembered_projections_of_positions(change: Change) -> None:
    positions, weight, bias = torch.rand(1, 50, 8), torch.rand(16, 8), torch.rand(16)
    project_positions(positions, weight, bias, remember=True)
    change([weight, bias])
    found = project_positions(positions, weight, bias, remember=True)
    torch.testing.assert_close(found, nn.functional.linear(positions, weight, bias).mT)


DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int8]


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_a_row_or_a_column_is_enough(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=4))
    weight = torch.zeros(shape, dtype=data.draw(st.sampled_from(DTYPES)))
    if len(shape) > 1:
        weight = data.draw(
            st.sampled_from([weight, weight.mT, weight.expand(2, *shape)[1], weight[..., 1:-1]])
        )
    if not weight.numel():
        return
    fingerprint = Fingerprint()
    key = fingerprint([weight])
    assert fingerprint([weight]) == key
    dim = data.draw(st.integers(0, weight.dim() - 1))
    if weight.dim() == 1:  # any value of a short vector
        changed = weight.data[data.draw(st.integers(0, weight.numel() - 1))]
    else:
        changed = weight.data.select(dim, data.draw(st.integers(0, weight.shape[dim] - 1)))
    changed.fill_(1)
    assert fingerprint([weight]) != key


def test_every_bit_of_a_value_counts() -> None:
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        vector, fingerprint = torch.zeros(5, dtype=dtype), Fingerprint()
        keys = {fingerprint([vector])}
        for bit in range(8 * dtype.itemsize):
            vector.data[3] = 1 << bit if bit < 8 * dtype.itemsize - 1 else -1 << bit
            keys.add(fingerprint([vector]))
        assert len(keys) == 8 * dtype.itemsize + 1


def test_a_storage_may_be_freed_and_come_back() -> None:
    """As FSDP does with parameters between two forwards; a new tensor may even lie where the freed one did."""
    weight, fingerprint = torch.ones(64, 64), Fingerprint()
    key = fingerprint([weight])
    storage = weight.untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    assert fingerprint([weight]) != key
    storage.resize_(size)
    weight.data.fill_(2)
    assert fingerprint([weight]) != key
    assert fingerprint([weight]) == fingerprint([weight])


OTHERS: dict[str, Callable[[Any], object]] = {
    "version": lambda weight: weight.detach()[0, 0].add_(1),
    "dtype": lambda weight: setattr(weight, "data", weight.data.double()),
    "place": lambda weight: setattr(weight, "data", weight.data.clone()),
    "strides": lambda weight: setattr(weight, "data", weight.data.T),
    "shape": lambda weight: setattr(weight, "data", weight.data.view(1, 9)),
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_another_tensor_in_its_place(change: Callable[[Any], object]) -> None:
    weight = nn.Parameter(torch.zeros(3, 3))
    fingerprint = Fingerprint()
    key = fingerprint([weight])
    change(weight)
    assert fingerprint([weight]) != key


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_begin_anew(duplicate: Callable[[Any], Any]) -> None:
    weight, fingerprint = torch.zeros(3, 3), Fingerprint()
    assert duplicate(fingerprint)([weight]) == fingerprint([weight])


@pytest.mark.parametrize(
    "tensor",
    [
        torch.empty(0),
        torch.empty(3, 0),
        torch.tensor(1.0),
        torch.empty(2, 3, device="meta"),
        torch.zeros(2, 3, dtype=torch.complex128),
        torch.zeros(4, 3, 5, 5).to(memory_format=torch.channels_last),
        torch.zeros(2, 3, dtype=torch.bool),
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)} {tensor.dtype} {tensor.device}",
)
def test_any_tensor_has_a_key(tensor: Tensor) -> None:
    fingerprint = Fingerprint()
    assert fingerprint([tensor]) == fingerprint([tensor])
    assert hash(fingerprint([tensor])) is not None
