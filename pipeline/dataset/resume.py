"""A place in an epoch that one iteration begins at, in whichever processes it runs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MAX_RANKS, _MAX_WORKERS = 64, 256  # that were given one dataset by pickling it; of each


@dataclass(kw_only=True, eq=False, slots=True)
class Resume:
    """Rows that were taken, for the next iteration of a dataset and no other.

    A DataLoader makes workers from the dataset of its own process, which cannot see that they have
    begun. So they write in shared memory which iteration they are of, by the seed that all workers
    of one have in common, and each that it did: those of any other begin at the start.
    """

    taken: int  # rows of the epoch
    steps: int  # of one reader, since then
    begun: Tensor  # (ranks, 1 + workers) int64, in shared memory: seed, then 1 for who began
    is_used: bool = False  # in this process

    @classmethod
    def at(cls, taken: int, steps: int) -> "Resume":
        """Return a place that no iteration has begun at."""
        begun = torch.zeros(_MAX_RANKS, 1 + _MAX_WORKERS, dtype=torch.int64)
        return cls(taken=taken, steps=steps, begun=begun.share_memory_())  # type: ignore[no-untyped-call]

    def is_open(self, rank: int) -> bool:
        """Tell whether the next iteration of a rank will begin here."""
        return not self.is_used and not int(self.begun[rank % _MAX_RANKS, 0])

    def use(self, worker: Any, rank: int) -> tuple[int, int]:  # noqa: ANN401  (torch's WorkerInfo)
        """Return rows taken and steps to the first iteration, and zeros from then on.

        Args:
            worker: of a DataLoader; None in a process of its own.
            rank: of the process.
        """
        is_first = self.is_open(rank)
        if worker is not None and not self.is_used:
            begun = self.begun[rank % _MAX_RANKS]
            seed = max(1, worker.seed - worker.id)
            begun[0] = int(begun[0]) or seed
            is_first = int(begun[0]) == seed and not int(begun[1 + worker.id])
            begun[1 + worker.id] = 1
        self.is_used = True
        return (self.taken, self.steps) if is_first else (0, 0)
