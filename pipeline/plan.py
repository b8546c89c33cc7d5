"""What a run has to do: the shards of the input that no commit covers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.cache import layout
from pipeline.cache.commit import check_identity, list_committed
from pipeline.job import Job
from pipeline.source import expand_shards, shard_id
from pipeline.storage import Store
from pipeline.types import ShardRef


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The shards of a run's input, by what is left to do."""

    shards: Sequence[ShardRef]
    todo: Sequence[ShardRef]

    works: Mapping[str, str]  # work fingerprint of every shard, by shard id

    @property
    def num_done(self) -> int:
        """Shards that are committed already."""
        return len(self.shards) - len(self.todo)

    @property
    def todo_bytes(self) -> int:
        """Size of the shards to do."""
        return sum(shard.size for shard in self.todo)


def make_plan(job: Job, store: Store) -> Plan:
    """List the input once and the commits once, and compare. Changes nothing.

    Raises:
        ConfigError: the input names no shard, or one that is not there; or the output holds a
            cache made with other settings.
    """
    if store.exists(layout.IDENTITY_PATH):
        check_identity(store, job.identity)
    shards = expand_shards(job.config.input.shards)
    committed = list_committed(store)
    works = {shard_id(s): job.work_fingerprint(s) for s in shards}
    todo = [s for s in shards if (shard_id(s), works[shard_id(s)]) not in committed]
    return Plan(shards=shards, todo=todo, works=works)
