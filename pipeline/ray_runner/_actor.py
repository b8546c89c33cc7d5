"""One process with its own device; runs in Ray."""

import logging
import platform
import resource
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import torch

from pipeline import run_log
from pipeline.cache.commit import Commit
from pipeline.carve_shard import ShardCarver
from pipeline.job import Job
from pipeline.ray_runner._failure import is_out_of_memory
from pipeline.types import ShardRef


@dataclass(frozen=True, kw_only=True, slots=True)
class ActorStatus:
    """How an actor is."""

    num_images: int = 0  # carved since its start
    peak_rss_bytes: int = 0
    queued_bytes: Mapping[str, int] = field(default_factory=dict)  # by the stage they wait for
    log: Sequence[Mapping[str, Any]] = ()  # lines since the last time, for `run_log.replay`


class CarveActor:
    """Holds the encoder and carves shards, two at a time: one has the device, one reads ahead."""

    def __init__(self, job: Job, *, run_id: str, name: str) -> None:
        self._log = _start_log(job, run_id, name)
        torch.set_num_threads(max(1, job.config.runner.cpus_per_actor))
        self._gpus = ray.get_gpu_ids()
        self._device = "cuda" if self._gpus and torch.cuda.is_available() else "cpu"
        self._num_images = 0
        self._carver = ShardCarver(job, device=self._device, on_progress=self._count)

    def _count(self, num_images: int) -> None:
        self._num_images += num_images

    def load(self) -> tuple[str, str]:
        """Load the weights and return the host, and what this actor works on, in words.

        Apart from the constructor, so that its error arrives as itself.
        """
        self._carver.load()
        host = platform.node()
        place = f"{host}: {self._device}"
        if self._gpus and self._device == "cpu":
            place += f", though Ray gave it GPU {self._gpus}: torch finds no CUDA device"
        return host, place

    def carve(self, shard: ShardRef, batch_size: int) -> Commit:
        """Carve and commit one shard."""
        try:
            return self._carver.carve(shard, batch_size=batch_size)
        except (RuntimeError, MemoryError) as err:
            if self._device == "cuda" and is_out_of_memory(err):
                torch.cuda.empty_cache()
            raise

    def abandon(self, shard: ShardRef) -> None:
        """End the attempt at a shard that is under way here, and remove its files."""
        self._carver.abandon(shard)

    def status(self) -> ActorStatus:
        """Return how this actor is; answers while carving."""
        return ActorStatus(
            num_images=self._num_images,
            peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
            queued_bytes=self._carver.queued_bytes(),
            log=self._log.drain(),
        )


def _start_log(job: Job, run_id: str, name: str) -> run_log.LogBuffer:
    """Log to this worker's own file and, for the driver to fetch, to a buffer.

    With JSON each shard has its line; as text the driver shows what went wrong alone.
    """
    runner = job.config.runner
    level = logging.INFO if runner.log_format == "json" else logging.WARNING
    run_log.bind(run_id=run_id, actor=name)
    run_log.log_to_stderr(runner.log_format)
    buffer = run_log.LogBuffer(level)
    logging.getLogger().addHandler(buffer)
    return buffer
