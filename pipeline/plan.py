"""What a run has to do: the shards of the input that no commit covers."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.cache import layout
from pipeline.cache.commit import check_identity
from pipeline.errors import ConfigError
from pipeline.job import Job
from pipeline.run_report import open_failures, read_summaries
from pipeline.source import expand_shards, shard_id
from pipeline.storage import Store
from pipeline.types import ShardRef

_MAX_NAMED = 5  # shards in an error
_MAX_RUNS = 20  # summaries looked at for one with images


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The shards of a run's input, by what is left to do."""

    shards: Sequence[ShardRef]
    todo: Sequence[ShardRef]
    changed: Sequence[ShardRef]  # committed as they were before their size or etag changed
    removed: Sequence[str]  # ids of shards that are committed and no longer in the input
    works: Mapping[str, str]
    """Work fingerprint by shard id, of every shard whose commit is to be of its present content."""

    @property
    def num_new(self) -> int:
        """Shards to do that were never committed."""
        return len(self.todo) - len({*self.todo} & {*self.changed})

    @property
    def num_done(self) -> int:
        """Shards that there is nothing to do for."""
        return len(self.shards) - len(self.todo)

    @property
    def todo_bytes(self) -> int:
        """Size of the shards to do."""
        return sum(shard.size for shard in self.todo)


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """What the shards to do will come to if they are like those of an earlier run."""

    run_id: str
    images: int
    hours: float
    output_bytes: int


def make_plan(job: Job, store: Store) -> Plan:
    """List the input once and the commits once, and compare. Changes nothing.

    Raises:
        ConfigError: the input names no shard, or one that is not there; the output holds a cache
            made with other settings; or shards have changed and `input.on_changed` forbids that.
    """
    if store.exists(layout.IDENTITY_PATH):
        check_identity(store, job.identity)
    shards = expand_shards(
        job.config.input.shards, allow_list_schemes=job.config.input.allow_list_schemes
    )
    known = {name for name in store.list_names(layout.COMMITS) if layout.parse_commit_path(name)}
    works: dict[str, str] = {}
    todo: list[ShardRef] = []
    for shard in shards:
        found, work = shard_id(shard), job.work_fingerprint(shard)
        works[found] = work
        record = layout.commit_path(found, work).rpartition("/")[2]
        if record in known:
            known.remove(record)
        else:
            todo.append(shard)
    # What is left are commits of shards as they were, or of shards that are gone.
    before = {parsed[0] for name in known if (parsed := layout.parse_commit_path(name))}
    changed = [shard for shard in todo if shard_id(shard) in before] if before else []
    on_changed = job.config.input.on_changed
    if changed and on_changed == "error":
        named = ", ".join(s.url for s in changed[:_MAX_NAMED])
        more = f" and {len(changed) - _MAX_NAMED} more" if len(changed) > _MAX_NAMED else ""
        raise ConfigError(
            f"{len(changed)} shards have changed since they were carved: {named}{more}; put them "
            "back, or carve them again or leave them as they were by input.on_changed=reprocess or "
            "ignore"
        )
    removed = sorted(before - works.keys())
    if changed and on_changed == "ignore":
        left = {*changed}
        todo = [shard for shard in todo if shard not in left]
        for shard in changed:
            del works[shard_id(shard)]
    return Plan(shards=shards, todo=todo, changed=changed, removed=removed, works=works)


def given_up(plan: Plan, store: Store) -> Mapping[str, str]:
    """Return the shards to do that one of the last 100 runs gave up: the latest reason by URL.

    Raises:
        CacheFormatError: the failures of a run cannot be read.
    """
    reasons = open_failures(store) if plan.todo else {}
    return {s.url: reasons[s.url] for s in plan.todo if s.url in reasons}


def estimate(plan: Plan, store: Store) -> Estimate | None:
    """Return what the shards to do will come to, by the rate of the last run that wrote images.

    Images of a shard are estimated from its size and the bytes of an image then, so that they are
    a few per cent too many: a tar file has headers.

    Returns:
        None where no run of this cache has written any.

    Raises:
        CacheFormatError: a run's summary cannot be read.
    """
    for done in itertools.islice(read_summaries(store), _MAX_RUNS):
        if not done["images"]:
            continue
        images = plan.todo_bytes * done["images"] / done["bytes_in"]
        return Estimate(
            run_id=done["run_id"],
            images=round(images),
            hours=images * done["seconds"] / done["images"] / 3600,
            output_bytes=round(images * done["bytes_tokens"] / done["images"]),
        )
    return None
