"""Reads rank and world size as torchrun, srun or mpirun set them, and divides the work."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from refsam.errors import UserError

Item = TypeVar("Item")

# Variables of rank, count and rank on the machine, by launcher; those of Slurm are a step's (srun), not a whole job's.
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
}


@dataclass(frozen=True)
class Launched:
    """This process's rank, how many there are, and its rank on this machine."""

    launcher: str
    rank: int
    count: int
    local_rank: int

    @staticmethod
    def by(launcher: str) -> "Launched | None":
        """Read the launcher's variables; None if they are not set. Raises UserError for impossible values."""
        rank, count, local_rank = LAUNCHERS[launcher]
        if rank not in os.environ or count not in os.environ:
            return None
        words = [os.environ[rank], os.environ[count], os.environ.get(local_rank, os.environ[rank])]
        numbers = [int(word) if word.isdecimal() else -1 for word in words]
        if not 0 <= numbers[0] < numbers[1]:
            got = f"{rank}={words[0]}, {count}={words[1]}"
            raise UserError(f"{got}: want 0 <= {rank} < {count}, as {launcher} sets them")
        return Launched(launcher, numbers[0], numbers[1], max(0, numbers[2]))


def local_rank() -> int:
    """This process's rank on its machine as torchrun sets it, else 0."""
    word = os.environ.get(LAUNCHERS["torchrun"][2], "")
    return int(word) if word.isdecimal() else 0


@dataclass(frozen=True)
class Shard:
    """This process's shard: number `rank` of `world_size` processes, as `torchrun` sets them."""

    rank: int = 0
    world_size: int = 1

    @staticmethod
    def from_environment() -> "Shard":
        """From RANK and WORLD_SIZE; one process if they are not set. Raises UserError for impossible values."""
        launched = Launched.by("torchrun")
        return Shard() if launched is None else Shard(launched.rank, launched.count)

    def of(self, items: Sequence[Item], cost: Callable[[Item], float]) -> list[Item]:
        """This process's items. They are dealt out in order of decreasing cost, in the same way in every process."""
        order = sorted(range(len(items)), key=lambda index: (-cost(items[index]), index))
        return [items[index] for index in order[self.rank :: self.world_size]]
