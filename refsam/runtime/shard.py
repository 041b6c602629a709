"""One process's shard of the work."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from refsam.errors import UserError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Shard:
    """This process's shard: number `rank` of `world_size` processes, as `torchrun` sets them."""

    rank: int = 0
    world_size: int = 1

    @staticmethod
    def from_environment() -> "Shard":
        """From RANK and WORLD_SIZE; one process where they are not set. Raises UserError for impossible values."""
        words = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        try:
            rank, world_size = (int(word) for word in words)
        except ValueError:
            rank, world_size = 0, 0
        if not 0 <= rank < world_size:
            raise UserError(
                f"RANK={words[0]}, WORLD_SIZE={words[1]}: want 0 <= RANK < WORLD_SIZE, as torchrun sets them"
            )
        return Shard(rank, world_size)

    def of(self, items: Sequence[Item], cost: Callable[[Item], float]) -> list[Item]:
        """This process's items, dealt by falling cost; every process deals them alike."""
        order = sorted(range(len(items)), key=lambda index: (-cost(items[index]), index))
        return [items[index] for index in order[self.rank :: self.world_size]]
