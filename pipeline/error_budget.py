"""How much of a run's input may be lost before the run stops."""

from dataclasses import dataclass, field

MIN_SHARDS = 8
"""Settled shards before a budget can be spent: what fewer say of a corpus is chance."""


@dataclass(kw_only=True)
class ErrorBudget:
    """Adds up what is lost of a run's shards, each weighed by its size.

    Lost is the share of rejected samples of a committed shard, and all of a shard that was given
    up. The limit is a share of all the run has to do, known when it starts. So whether a run ends
    with its budget spent does not depend on the order of the shards; only when it notices does.

    Args:
        max_ratio: the share that may be lost; 1 for all.
        total_bytes: size of the shards of the run.
    """

    max_ratio: float
    total_bytes: int
    lost_bytes: float = field(default=0.0, init=False)
    num_settled: int = field(default=0, init=False)

    def settle(self, shard_bytes: int, *, lost_ratio: float) -> None:
        """Count one shard.

        Args:
            shard_bytes: its size.
            lost_ratio: the share of its samples that is lost, 0 to 1.
        """
        self.num_settled += 1
        self.lost_bytes += shard_bytes * lost_ratio

    @property
    def lost_ratio(self) -> float:
        """Share of the run's input that is known to be lost."""
        return self.lost_bytes / self.total_bytes if self.total_bytes else 0.0

    @property
    def is_spent(self) -> bool:
        """Whether more is lost than may be, whatever becomes of the other shards."""
        return self.num_settled >= MIN_SHARDS and self.lost_ratio > self.max_ratio
