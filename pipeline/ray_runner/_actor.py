"""One process with its own device; runs in Ray."""

import logging
import platform
import resource

import ray
import torch

from pipeline.cache.commit import Commit
from pipeline.carve_shard import ShardCarver
from pipeline.job import Job
from pipeline.types import ShardRef


class CarveActor:
    """Holds the encoder and carves shards, two at a time: one has the device, one reads ahead."""

    def __init__(self, job: Job) -> None:
        logging.basicConfig(level=logging.WARNING)
        torch.set_num_threads(max(1, job.config.runner.cpus_per_actor))
        self._gpus = ray.get_gpu_ids()
        self._device = "cuda" if self._gpus and torch.cuda.is_available() else "cpu"
        self._num_images = 0
        self._carver = ShardCarver(job, device=self._device, on_progress=self._count)

    def _count(self, num_images: int) -> None:
        self._num_images += num_images

    def load(self) -> str:
        """Load the weights and return what this actor works on, in words.

        Apart from the constructor, so that its error arrives as itself.
        """
        self._carver.load()
        place = f"{platform.node()}: {self._device}"
        if self._gpus and self._device == "cpu":
            return f"{place}, though Ray gave it GPU {self._gpus}: torch finds no CUDA device"
        return place

    def carve(self, shard: ShardRef, batch_size: int) -> Commit:
        """Carve and commit one shard."""
        try:
            return self._carver.carve(shard, batch_size=batch_size)
        except torch.OutOfMemoryError:
            if self._device == "cuda":
                torch.cuda.empty_cache()
            raise

    def status(self) -> tuple[int, int]:
        """Return (images carved since the start, peak resident bytes); answers while carving."""
        return self._num_images, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
