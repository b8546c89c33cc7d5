"""Carve one shard, from its byte stream to its commit, in one process and without Ray.

Two shards may be in flight: the second reads and decodes ahead while the first has the device, so
that no gap opens between shards.
"""

import logging
import os
import platform
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from pipeline.cache.commit import Commit, rows_version, try_commit
from pipeline.cache.writer import ShardWriter
from pipeline.errors import ConfigError, ShardError
from pipeline.job import Job
from pipeline.run_log import about
from pipeline.shard_pipeline import ShardPipeline, Stations, Tally
from pipeline.source import shard_id
from pipeline.storage import Store, open_store
from pipeline.types import ShardRef

logger = logging.getLogger(__name__)

_QUEUE_MIB, _QUEUE_MIB_CPU = 256, 32  # 90 images of 336 x 336 keep a core at work for seconds
_MAX_LOGGED = 5  # rejected samples of a shard; all of them are in its errors.parquet


class ShardCarver:
    """Carves shards of one job on one device; `carve` may be called from two threads.

    Args:
        job: what to do.
        device: a torch device.
        on_progress: called from the carving thread with the images done since its last call.
    """

    def __init__(
        self,
        job: Job,
        *,
        device: str = "cpu",
        on_progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.job = job
        self.device = device
        self.store: Store = open_store(job.config.output.url)
        runner = job.config.runner
        threads = runner.decode_threads
        # Beside a tower on the same cores more threads only take turns, and cost memory.
        least = 1 if device == "cpu" else 2
        num_threads = max(least, runner.cpus_per_actor) if threads == "auto" else threads
        queue_mib = runner.queue_mib
        if queue_mib == "auto":
            queue_mib = _QUEUE_MIB_CPU if device == "cpu" else _QUEUE_MIB
        self._stations = Stations(
            job=job,
            decoders=ThreadPoolExecutor(num_threads, thread_name_prefix="decode"),
            packers=ThreadPoolExecutor(num_threads, thread_name_prefix="pack"),
            queue_bytes=queue_mib << 20,
            on_progress=on_progress,
        )
        self._under_way: dict[str, ShardPipeline] = {}  # by URL

    @cached_property
    def _format_version(self) -> int:
        """That of the cache: shards are added as those before were written."""
        return rows_version(self.store)

    def load(self) -> None:
        """Load the weights that the job's stage and carver need.

        Raises:
            ConfigError: they cannot be loaded, or are not those the job was planned with.
        """
        planned = {k: v for k, v in self.job.settings["encoder"].items() if k != "name"}
        _check_planned("model", self.job.encoder.describe(self.job.carver.needs), planned)
        options = self.job.settings["carver"]["options"]
        _check_planned("carver", self.job.carver.describe(), options)
        dtype = getattr(torch, self.job.config.runner.dtype)
        self.job.encoder.load(device=self.device, dtype=dtype, signals=self.job.carver.needs)

    def close(self) -> None:
        """End the threads."""
        self._stations.decoders.shutdown(wait=False, cancel_futures=True)
        self._stations.packers.shutdown(wait=False, cancel_futures=True)

    def abandon(self, shard: ShardRef) -> None:
        """Have the `carve` of a shard in another thread end without a commit, if it still can."""
        if stages := self._under_way.get(shard.url):
            stages.abandon()

    def queued_bytes(self) -> Mapping[str, int]:
        """Return what waits in the queues of the shards under way, by the stage it waits for."""
        queues = [(s.to_encode, s.to_write) for s in list(self._under_way.values())]
        return {
            "encode": sum(to_encode.num_bytes for to_encode, _ in queues),
            "write": sum(to_write.num_bytes for _, to_write in queues),
        }

    def carve(self, shard: ShardRef, *, batch_size: int | None = None) -> Commit:
        """Carve one shard and commit it.

        Args:
            shard: as listed; enters the commit.
            batch_size: images per encoder call; None for the configured one.

        Returns:
            The commit that stands for this work: this attempt's, or an earlier winner's.

        Raises:
            ShardError: the shard is damaged or has too many bad samples; nothing is committed.
            StorageError: the input or the output cannot be reached.
            ShardAbandonedError: `abandon` was called for it.
        """
        size = batch_size or self.job.config.runner.batch_size
        stages = ShardPipeline(self._stations, shard=shard, batch_size=size)
        self._under_way[shard.url] = stages
        try:
            return self._carve(shard, stages)
        finally:
            del self._under_way[shard.url]

    def _carve(self, shard: ShardRef, stages: ShardPipeline) -> Commit:
        started = time.time()
        with ShardWriter(
            store=self.store,
            shard_id=shard_id(shard),
            attempt=f"{int(started):x}-{uuid.uuid4().hex[:12]}",
            columns=self.job.columns,
            metadata=self.job.metadata,
            format_version=self._format_version,
            row_group_bytes=self.job.config.output.row_group_mib << 20,
            part_bytes=self.job.config.output.part_mib << 20,
        ) as writer:
            tally = stages.run(writer)
            _log_rejected(shard, tally)
            self._check_bad_ratio(shard, tally)
            files = writer.finish(tally.rejected)
            commit = self._commit_record(shard, writer, stages, started)
            stages.check_wanted()
        standing = try_commit(self.store, replace(commit, files=tuple(files)))
        logger.info(
            "shard %s: %d of %d images committed in %.1f s",
            shard.url,
            standing.num_written,
            standing.num_read,
            standing.seconds,
            extra=about(shard=shard.url, attempt_id=standing.attempt),
        )
        return standing

    def _check_bad_ratio(self, shard: ShardRef, tally: Tally) -> None:
        allowed = self.job.config.runner.max_bad_ratio
        if tally.rejected and len(tally.rejected) > allowed * tally.num_read:
            reasons = Counter(r.reason for r in tally.rejected)
            worst = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common(3))
            raise ShardError(
                f"{shard.url}: {len(tally.rejected)} of {tally.num_read} samples are bad ({worst}; "
                f"first: {tally.rejected[0].key!r}: {tally.rejected[0].message}), more than "
                f"runner.max_bad_ratio={allowed} allows: repair the shard or raise the limit",
                shard=shard.url,
                reason="too_many_bad_samples",
            )

    def _commit_record(
        self, shard: ShardRef, writer: ShardWriter, stages: ShardPipeline, started: float
    ) -> Commit:
        now, tally = time.time(), stages.tally
        return Commit(
            shard_id=writer.shard_id,
            shard=shard,
            work_fingerprint=self.job.work_fingerprint(shard),
            attempt=writer.attempt,
            files=(),
            num_read=tally.num_read,
            num_written=tally.num_written,
            rejected=dict(sorted(Counter(r.reason for r in tally.rejected).items())),
            bytes_in=tally.bytes_in,
            tokens_full=tally.tokens_full,
            tokens_kept=tally.tokens_kept,
            bytes_tokens=tally.bytes_tokens,
            seconds=round(now - started, 3),
            details={
                "host": platform.node(),
                "pid": os.getpid(),
                "device": self.device,
                "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
                "batch_size": stages.batch_size,
                "stage_seconds": {k: round(v, 3) for k, v in sorted(tally.seconds.items())},
            },
            committed_at=now,
        )


def _log_rejected(shard: ShardRef, tally: Tally) -> None:
    for sample in tally.rejected[:_MAX_LOGGED]:
        logger.info(
            "shard %s: sample %r rejected (%s): %s",
            shard.url,
            sample.key,
            sample.reason,
            sample.message,
            extra=about(shard=shard.url, key=sample.key),
        )
    if (more := len(tally.rejected) - _MAX_LOGGED) > 0:
        logger.info(
            "shard %s: %d more samples rejected", shard.url, more, extra=about(shard=shard.url)
        )


def _check_planned(kind: str, described: Mapping[str, Any], planned: Mapping[str, Any]) -> None:
    if dict(described) != dict(planned):
        raise ConfigError(
            f"the {kind} on host {platform.node()} is not the one this run was planned with "
            f"({dict(described)} here, {dict(planned)} there): give all nodes the same files"
        )
