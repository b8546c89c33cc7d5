"""What each stage costs alone, and how fast the bare tower is: the yardsticks of `throughput.py`.

Every process measures one stage after the other in one thread. As many processes as there are
cores may do so at once, since cores that share caches, memory and clock slow each other down.
"""

import hashlib
import multiprocessing
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.synchronize import Barrier
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from pipeline.cache.commit import Commit, try_commit
from pipeline.cache.writer import RowToWrite, ShardWriter
from pipeline.decode import decode_image
from pipeline.encoders import Pixels
from pipeline.heap import keep_freed_memory
from pipeline.job import Job
from pipeline.source import expand_shards, read_shard, shard_id
from pipeline.storage import open_store
from pipeline.types import CarvedTokens, Sample, ShardRef, VisualTokens

STAGES = ("read", "hash", "decode", "preprocess", "tower", "carve", "pack", "write")
DEVICE_STAGES = ("tower", "carve")


@dataclass(kw_only=True)
class Stopwatch:
    """Adds up the CPU time of this process by stage, or wall time where a GPU does the work."""

    device: str
    seconds: dict[str, float]

    @contextmanager
    def time(self, stage: str) -> Any:  # noqa: ANN401
        """Add the time of the block to a stage."""
        on_gpu = self.device != "cpu" and stage in DEVICE_STAGES
        clock = time.perf_counter if on_gpu else time.process_time
        started = clock()
        yield
        if on_gpu:
            torch.cuda.synchronize()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + clock() - started


def measure_stages(job: Job, *, num_images: int, device: str, processes: int) -> dict[str, float]:
    """Return the core-seconds per image of each stage; seconds of the device for its stages.

    Args:
        job: whose work is measured, on the first images of its input.
        num_images: on which each process measures; rounded up to whole batches.
        device: of the encoder.
        processes: how many measure at once; their mean is returned.
    """
    results = _in_processes(processes, partial(_stages, job, num_images, device))
    return {stage: statistics.mean(r[stage] for r in results) for stage in results[0]}


def measure_tower(
    model: str, *, batch_size: int, num_batches: int, device: str, dtype: str, processes: int
) -> float:
    """Return images per second of the bare tower on tensors that lie ready, all processes together.

    The tower is transformers' own class with the layers that LLaVA uses, and gives no signals.
    """
    work = partial(_tower, model, batch_size, num_batches, device, dtype)
    return sum(_in_processes(processes, work))


def work_shares(costs: Mapping[str, float]) -> tuple[float, float, float]:
    """Return the shares of the work of an image up to its pixels, its packed tokens, its file."""
    packed = costs["tower"] + costs["carve"] + costs["pack"]
    total = sum(costs.values())
    return (total - packed - costs["write"]) / total, packed / total, costs["write"] / total


def bound(costs: Mapping[str, float], *, cores: int, gpus: int) -> float:
    """Return the images per second that no schedule of these stages can exceed.

    Args:
        costs: seconds per image by stage.
        cores: that share the stages of the CPU.
        gpus: that share the stages of the device; 0 where the cores do those as well.
    """
    on_device = sum(costs[stage] for stage in DEVICE_STAGES)
    on_cores = sum(costs.values()) - (on_device if gpus else 0.0)
    return min(cores / on_cores, gpus / on_device) if gpus else cores / on_cores


def _in_processes(count: int, work: Callable[[Barrier], Any]) -> list[Any]:
    """Call `work` in fresh processes, which wait for each other at the barrier they are given."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        barrier = manager.Barrier(count)
        with context.Pool(count) as pool:
            return pool.map(work, [barrier] * count, chunksize=1)


def _stages(job: Job, num_images: int, device: str, barrier: Barrier) -> dict[str, float]:
    keep_freed_memory()  # as the pipeline's actors
    torch.set_num_threads(1)
    dtype = getattr(torch, job.config.runner.dtype)
    job.encoder.load(device=device, dtype=dtype, signals=job.carver.needs)
    size = job.config.runner.batch_size
    num_images = -(-num_images // size) * size
    shards = expand_shards(job.config.input.shards)
    watch = Stopwatch(device=device, seconds={})
    _measure(job, shards, size, Stopwatch(device=device, seconds={}))  # warm-up: one batch
    barrier.wait()
    _measure(job, shards, num_images, watch)
    return {stage: watch.seconds[stage] / num_images for stage in STAGES}


def _measure(job: Job, shards: Sequence[ShardRef], num_images: int, watch: Stopwatch) -> None:
    samples = _read(job, shards, num_images, watch)
    with watch.time("hash"):
        hashes = [hashlib.sha256(s.image).digest()[:16] for s in samples]
    pixels: list[Pixels] = []
    for sample in samples:
        with watch.time("decode"):
            image = decode_image(sample.image, key=sample.key, options=job.decode)
        with watch.time("preprocess"):
            pixels.append(job.encoder.preprocess(image))
    size = job.config.runner.batch_size
    carved: list[CarvedTokens] = []
    for start in range(0, len(pixels), size):
        with watch.time("tower"):
            groups = job.encoder.encode_pixels(pixels[start : start + size])
        carved += _carve(job, groups, watch)
    rows = [_pack(job, *parts, watch=watch) for parts in zip(samples, hashes, carved, strict=True)]
    _write(job, shards[0], rows, watch)


def _read(job: Job, shards: Sequence[ShardRef], num_images: int, watch: Stopwatch) -> list[Sample]:
    samples: list[Sample] = []
    for shard in shards:
        with watch.time("read"):
            found = list(read_shard(shard, job.source))
        samples += [sample for sample in found if isinstance(sample, Sample)]
        if len(samples) >= num_images:
            # What was read too much is taken out of the time.
            watch.seconds["read"] *= num_images / len(samples)
            return samples[:num_images]
    raise ValueError(f"{len(shards)} shards hold {len(samples)} images; {num_images} are needed")


def _carve(job: Job, groups: Sequence[VisualTokens], watch: Stopwatch) -> list[CarvedTokens]:
    (group,) = groups  # all images have one shape, so they come back in order
    with watch.time("carve"):
        return job.carver.carve(group)


def _pack(
    job: Job, sample: Sample, content_hash: bytes, tokens: CarvedTokens, *, watch: Stopwatch
) -> RowToWrite:
    with watch.time("pack"):
        order = np.argsort(tokens.ranks.cpu().numpy(), kind="stable")
        by_rank = torch.from_numpy(order).to(tokens.features.device)
        packed = job.codec.pack(tokens.features[by_rank])
        return RowToWrite(
            key=sample.key,
            content_hash=content_hash,
            packed=packed,
            positions=tokens.positions.cpu().numpy()[order].astype(np.uint32),
            sizes=tokens.sizes.cpu().numpy()[order].astype(np.float32),
            grid=(1, 24, 24),
            image_size=(640, 480),
            columns={name: sample.columns[name].decode() for name in job.columns},
        )


def _write(job: Job, shard: ShardRef, rows: Sequence[RowToWrite], watch: Stopwatch) -> None:
    with tempfile.TemporaryDirectory() as folder, watch.time("write"):
        store = open_store(folder)
        writer = ShardWriter(
            store=store,
            shard_id=shard_id(shard),
            attempt=uuid.uuid4().hex,
            columns=job.columns,
            metadata=job.metadata,
        )
        for row in rows:
            writer.write(row)
        files = writer.finish([])
        try_commit(store, _commit(job, shard, writer, len(rows), tuple(files)))


def _commit(
    job: Job, shard: ShardRef, writer: ShardWriter, num_rows: int, files: tuple[Any, ...]
) -> Commit:
    return Commit(
        shard_id=writer.shard_id,
        shard=shard,
        work_fingerprint=job.work_fingerprint(shard),
        attempt=writer.attempt,
        files=files,
        num_read=num_rows,
        num_written=num_rows,
        rejected={},
        bytes_in=0,
        tokens_full=0,
        tokens_kept=0,
        bytes_tokens=0,
        seconds=0.0,
    )


def _tower(
    model: str, batch_size: int, num_batches: int, device: str, dtype: str, barrier: Barrier
) -> float:
    keep_freed_memory()  # as the pipeline's actors
    torch.set_num_threads(1)
    config = transformers.LlavaConfig.from_pretrained(model)
    vision = config.vision_config
    vision.num_hidden_layers += 1 + config.vision_feature_layer  # the layers behind it do not run
    tower: Any = transformers.CLIPVisionModel(vision).eval()
    tower.post_layernorm = torch.nn.Identity()
    tower.to(device=device, dtype=getattr(torch, dtype))
    pixels = torch.randn(batch_size, 3, 336, 336).to(device=device, dtype=getattr(torch, dtype))
    for _ in range(2):
        _forward(tower, pixels)
    barrier.wait()
    started = time.perf_counter()
    for _ in range(num_batches):
        _forward(tower, pixels)
    if device != "cpu":
        torch.cuda.synchronize()
    return batch_size * num_batches / (time.perf_counter() - started)


def _forward(tower: Any, pixels: Tensor) -> None:  # noqa: ANN401
    with torch.inference_mode():
        tower(pixel_values=pixels)
