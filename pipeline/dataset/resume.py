"""A place in an epoch that one iteration begins at, in whichever process it runs."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MAX_WORKERS = 4096


@dataclass(frozen=True, kw_only=True, eq=False, slots=True)
class Resume:
    """Rows that were taken, for the next iteration of a dataset and no other.

    A DataLoader makes workers from the dataset of its own process, which cannot see that they have
    begun. So each worker marks in shared memory that it did: the workers of the next epoch see it.
    """

    taken: int  # rows of the epoch
    steps: int  # of one reader, since then
    used: Tensor  # (workers + 1,) uint8, in shared memory

    @classmethod
    def at(cls, taken: int, steps: int) -> "Resume":
        """Return a place that no iteration has begun at."""
        used = torch.zeros(_MAX_WORKERS + 1, dtype=torch.uint8).share_memory_()  # type: ignore[no-untyped-call]
        return cls(taken=taken, steps=steps, used=used)

    def use(self, worker: Any) -> tuple[int, int]:  # noqa: ANN401  (torch's WorkerInfo)
        """Return rows taken and steps, the first time, and zeros from then on.

        Args:
            worker: of a DataLoader; None in a process of its own.
        """
        number = _MAX_WORKERS if worker is None else worker.id
        if self.used[number]:
            return 0, 0
        self.used[number] = 1
        return self.taken, self.steps
