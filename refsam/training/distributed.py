"""Runs training on several processes: rank and device, exchange of values, sharding of weights.

`torchrun` starts them, on one machine or many. Only the data must be visible to all of them: the first process alone
reads and writes the output folder.
"""

import gc
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from refsam.errors import UserError
from refsam.runtime.device import gpus_here
from refsam.runtime.shard import LAUNCHERS, Launched

Value = TypeVar("Value")


@dataclass(frozen=True)
class Processes:
    """This process among the `count` of a run; `device` is what it computes on."""

    rank: int
    count: int
    device: torch.device

    @classmethod
    def join(cls, device: str) -> "Processes":
        """Join the processes that torchrun, srun or mpirun started, or be the only one; with `device` "cuda" each gets a GPU.

        Raises UserError if there is no such GPU, or if several processes cannot find each other: each would train by itself,
        into the same folder.
        """
        started = _started()
        place = _place(device, started)
        if started is None:
            return cls(0, 1, place)
        if not dist.is_initialized():
            dist.init_process_group(
                "nccl" if place.type == "cuda" else "gloo",
                rank=started.rank,
                world_size=started.count,
            )
        return cls(dist.get_rank(), dist.get_world_size(), place)

    def leave(self) -> None:
        """Leave the process group; release the module that exchanges gradients first."""
        gc.collect()  # a DistributedDataParallel that outlives its process group may wait for it forever
        if dist.is_initialized():
            dist.destroy_process_group()

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            dist.barrier()

    @property
    def is_first(self) -> bool:
        """Whether this is the one that reads and writes the output folder."""
        return self.rank == 0

    def maximum(self, value: int) -> int:
        """The largest of all processes' values."""
        if self.count == 1:
            return value
        values = torch.tensor(value, device=self.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return int(values)

    def means(self, values: dict[str, float]) -> dict[str, float]:
        """The mean of each entry over the processes, whose dictionaries have the same keys."""
        rows = self.gather(values)
        return {name: sum(row[name] for row in rows) / self.count for name in values}

    def gather(self, value: Value) -> list[Value]:
        """Every process's value, by rank; values are pickled, so keep them small."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Value) -> Value:
        """The first process's value, on all processes; it is pickled, so keep it small."""
        if self.count == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values)
        return values[0]

    def tensors_from_first(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The first process's tensors, on every process; the other processes pass an empty dictionary."""
        if self.count == 1:
            return tensors
        shapes = self.from_first({name: (t.shape, t.dtype) for name, t in tensors.items()})
        received = {}
        for name, (shape, dtype) in shapes.items():
            value = tensors[name] if self.is_first else torch.empty(shape, dtype=dtype)
            value = value.to(self.device)
            dist.broadcast(value, src=0)
            received[name] = value.cpu()
        return received


def _started() -> Launched | None:
    """This process's rank among several, None if it was started alone; raises UserError if they cannot find each other."""
    for found in filter(None, map(Launched.by, LAUNCHERS)):
        if found.count == 1 and not dist.is_torchelastic_launched():
            continue
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            raise UserError(
                f"{found.count} processes were started by {found.launcher} and cannot find each other, as "
                f"{' and '.join(missing)} are not set: set them to the first machine and a free port, or start with torchrun"
            )
        return found
    return None


def _place(device: str, started: Launched | None) -> torch.device:
    """The device of that name for this process; raises UserError if the machine lacks it."""
    try:
        place = torch.device(device)
    except RuntimeError:
        raise UserError(f"device: got {device!r}, want cpu, cuda or cuda:N") from None
    if place.type != "cuda":
        return place
    count = torch.cuda.device_count()
    if started is not None:
        place = torch.device("cuda", started.local_rank % max(1, count))
    if (place.index or 0) >= count:
        raise UserError(f"device: got {device}, {gpus_here()}; take device=cpu")
    torch.cuda.set_device(place)
    return place


class SharedModule:
    """Wraps `module` for several processes: called like it, with one backward for each call.

    `ddp`: each process has all weights, and gradients are averaged (DistributedDataParallel). `fsdp`: weights, gradients and
    the optimiser's state are sharded over the processes (`fully_shard`), block by block. `whole` are parameters that every
    process holds: the blocks' first norms, which the previous block computes, and scalars, which cannot be sharded.
    """

    def __init__(self, module: nn.Module, parallel: str, processes: Processes) -> None:
        self.processes = processes
        self.whole: list[nn.Parameter] = []
        self.module: Any = module
        if parallel == "fsdp":
            self._shard(module)
        elif processes.count > 1:
            # Not every stage uses every part, and none uses the three mask tokens' networks that RefSAM does not read.
            self.module = DistributedDataParallel(module, find_unused_parameters=True)

    def _shard(self, module: nn.Module) -> None:
        if not dist.is_initialized():
            raise UserError("parallel: got fsdp, want processes started by torchrun for it")
        mesh = init_device_mesh(self.processes.device.type, (self.processes.count,))
        blocks = list(module.get_submodule("model.image_encoder.blocks").children())
        firsts = [p for block in blocks for p in block.get_submodule("norm1").parameters()]
        # The warning is about changing outputs in place, which nothing does here.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
        self.whole = [*firsts, *(p for p in module.parameters() if p.ndim == 0)]
        for block in blocks:
            fully_shard(block, mesh=mesh, ignored_params=set(self.whole))
        fully_shard(module, mesh=mesh, ignored_params=set(self.whole))

    def __call__(self, *arguments: Any) -> Any:
        return self.module(*arguments)

    def release(self) -> None:
        """Release the wrapper that exchanges gradients; needed before the process group ends."""
        self.module = None

    def accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        """Wrap forward and backward of one accumulated batch: gradients are exchanged in the last one only."""
        if isinstance(self.module, FSDPModule):
            self.module.set_requires_gradient_sync(is_last)
        elif isinstance(self.module, DistributedDataParallel) and not is_last:
            return self.module.no_sync()
        return nullcontext()

    def finish_gradients(self) -> None:
        """Average the gradients of parameters that `fully_shard` left whole; call it after the last backward of a step."""
        for parameter in self.whole:
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad)
                parameter.grad.div_(self.processes.count)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Within the block, other methods of a sharded module can be called too; its blocks still gather themselves."""
        if not isinstance(self.module, FSDPModule):
            yield
            return
        self.module.unshard()
        try:
            yield
        finally:
            self.module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, gathered if it is sharded; all processes must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Shard a whole tensor, equal on all processes, as another one is, on its device."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
