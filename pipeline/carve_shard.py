"""Carve one shard, from its byte stream to its commit, in one process and without Ray.

    reader thread -> decode threads -> the calling thread: encode, carve -> writer thread -> commit

The stages run at once, joined by queues bounded in bytes. Two shards may be in flight: the second
reads and decodes ahead while the first has the device, so that no gap opens between shards.
"""

import hashlib
import logging
import os
import platform
import threading
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch

from pipeline.byte_queue import ByteQueue, QueueStoppedError
from pipeline.cache.commit import Commit, try_commit
from pipeline.cache.layout import FORMAT_VERSION
from pipeline.cache.writer import RowToWrite, ShardWriter
from pipeline.decode import decode_image
from pipeline.encoders import Pixels
from pipeline.errors import NonFiniteError, SampleError, ShardError
from pipeline.job import Job
from pipeline.source import read_shard, shard_id
from pipeline.storage import Store, open_store
from pipeline.types import CarvedTokens, RejectedSample, Sample, ShardRef

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Prepared:
    """One image ready for the encoder."""

    key: str
    content_hash: bytes
    image_size: tuple[int, int]  # width, height
    pixels: Pixels
    columns: dict[str, str | None]
    seconds: float  # spent decoding and preprocessing


@dataclass(frozen=True, kw_only=True, slots=True)
class _Carved:
    """One image after the carver; its tensors may still lie on the device."""

    image: _Prepared  # without pixels
    tokens: CarvedTokens
    grid: tuple[int, int]


@dataclass(kw_only=True)
class _Tally:
    """What one shard came to."""

    num_read: int = 0
    num_written: int = 0
    rejected: list[RejectedSample] = field(default_factory=list)
    bytes_in: int = 0
    tokens_full: int = 0
    tokens_kept: int = 0
    bytes_tokens: int = 0
    seconds: defaultdict[str, float] = field(  # by stage; each thread has its own keys
        default_factory=lambda: defaultdict(float)
    )


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
        self.on_progress = on_progress
        self.store: Store = open_store(job.config.output.url)
        runner = job.config.runner
        threads = runner.decode_threads
        self.num_decoders = max(2, runner.cpus_per_actor) if threads == "auto" else threads
        self._decoders = ThreadPoolExecutor(self.num_decoders, thread_name_prefix="decode")
        self._device_turn = threading.Lock()
        self._prepared_bytes = 1 << 20  # of one image; corrected by the first

    def load(self) -> None:
        """Load the weights that the job's stage and carver need."""
        dtype = getattr(torch, self.job.config.runner.dtype)
        self.job.encoder.load(device=self.device, dtype=dtype, signals=self.job.carver.needs)

    def close(self) -> None:
        """End the decode threads."""
        self._decoders.shutdown(wait=False, cancel_futures=True)

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
        """
        started = time.time()
        size = batch_size or self.job.config.runner.batch_size
        run = _ShardRun(carver=self, shard=shard, batch_size=size)
        with ShardWriter(
            store=self.store,
            shard_id=shard_id(shard),
            attempt=f"{int(started):x}-{uuid.uuid4().hex[:12]}",
            columns=self.job.columns,
            metadata=self.job.metadata,
            row_group_bytes=self.job.config.output.row_group_mib << 20,
            part_bytes=self.job.config.output.part_mib << 20,
        ) as writer:
            tally = run.run(writer)
            self._check_bad_ratio(shard, tally)
            files = writer.finish(tally.rejected)
            commit = self._commit_record(shard, writer, tally, started)
        standing = try_commit(self.store, replace(commit, files=tuple(files)))
        logger.info(
            "shard %s: %d of %d images committed in %.1f s",
            shard.url,
            standing.num_written,
            standing.num_read,
            standing.seconds,
        )
        return standing

    def _check_bad_ratio(self, shard: ShardRef, tally: _Tally) -> None:
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
        self, shard: ShardRef, writer: ShardWriter, tally: _Tally, started: float
    ) -> Commit:
        now = time.time()
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
                "batch_size": self.job.config.runner.batch_size,
                "stage_seconds": {k: round(v, 3) for k, v in sorted(tally.seconds.items())},
                "format_version": FORMAT_VERSION,
            },
            committed_at=now,
        )


class _ShardRun:
    """The threads and queues of one shard."""

    def __init__(self, *, carver: ShardCarver, shard: ShardRef, batch_size: int) -> None:
        self.carver = carver
        self.job = carver.job
        self.shard = shard
        self.batch_size = batch_size
        self.tally = _Tally()
        limit = self.job.config.runner.queue_mib << 20
        self.to_encode: ByteQueue[Future[_Prepared | RejectedSample]] = ByteQueue(limit)
        self.to_write: ByteQueue[list[_Carved]] = ByteQueue(limit)

    def run(self, writer: ShardWriter) -> _Tally:
        """Carve all samples; on an error all threads end before it is raised."""
        with ThreadPoolExecutor(2, thread_name_prefix="shard") as pool:
            reading = pool.submit(self._read)
            writing = pool.submit(self._write, writer)
            try:
                # One shard at a time has the device; the next one fills its queue meanwhile.
                with self.carver._device_turn:
                    self._encode()
                self.to_write.close()
                writing.result()
            except QueueStoppedError:
                writing.result()  # the writer failed and stopped the queue: raise its error
                raise
            finally:
                self.to_encode.stop()
                self.to_write.stop()
            reading.result()
        return self.tally

    def _read(self) -> None:
        """Read samples and hand them to the decode threads, in shard order."""
        seconds = self.tally.seconds
        try:
            for sample in _timed(read_shard(self.shard, self.job.source), seconds, "read"):
                self.tally.num_read += 1
                if isinstance(sample, RejectedSample):
                    done: Future[_Prepared | RejectedSample] = Future()
                    done.set_result(sample)
                    self.to_encode.put(done, 0)
                else:
                    self.tally.bytes_in += len(sample.image)
                    cost = len(sample.image) + self.carver._prepared_bytes
                    self.to_encode.put(self.carver._decoders.submit(self._prepare, sample), cost)
        except QueueStoppedError:
            logger.debug("shard %s: reading ended early", self.shard.url)
        finally:
            self.to_encode.close()

    def _prepare(self, sample: Sample) -> _Prepared | RejectedSample:
        """Decode and preprocess one sample; runs in a decode thread."""
        started = time.perf_counter()
        try:
            image = decode_image(sample.image, key=sample.key, options=self.job.decode)
            columns = {name: _text(sample, name) for name in self.job.columns}
        except SampleError as err:
            return _reject(err)
        pixels = self.job.encoder.preprocess(image)
        self.carver._prepared_bytes = pixels.nbytes
        return _Prepared(
            key=sample.key,
            content_hash=hashlib.sha256(sample.image).digest()[:16],
            image_size=(image.shape[1], image.shape[0]),
            pixels=pixels,
            columns=columns,
            seconds=time.perf_counter() - started,
        )

    def _encode(self) -> None:
        seconds = self.tally.seconds
        for batch in self._batches():
            started = time.perf_counter()
            groups = self.job.encoder.encode_pixels([image.pixels for image in batch])
            encoded = time.perf_counter()
            carved: list[_Carved | None] = [None] * len(batch)
            for group in groups:
                indices = group.image_indices or range(len(batch))
                for index, tokens in zip(indices, self.job.carver.carve(group), strict=True):
                    image = replace(batch[index], pixels=_NO_PIXELS)
                    carved[index] = _Carved(image=image, tokens=tokens, grid=group.grid)
                self.tally.tokens_full += group.features.shape[0] * group.features.shape[1]
            seconds["encode"] += encoded - started
            seconds["carve"] += time.perf_counter() - encoded
            done = [c for c in carved if c is not None]
            self.to_write.put(done, sum(_num_bytes(c.tokens.features) for c in done))
            self.carver.on_progress(len(batch))

    def _batches(self) -> Iterator[list[_Prepared]]:
        """Yield full batches of good images in shard order; note the bad ones."""
        batch: list[_Prepared] = []
        for future in self.to_encode:
            image = future.result()
            if isinstance(image, RejectedSample):
                self.tally.rejected.append(image)
                continue
            self.tally.seconds["decode"] += image.seconds
            batch.append(image)
            if len(batch) == self.batch_size:
                yield batch
                batch = []
        if batch:
            yield batch

    def _write(self, writer: ShardWriter) -> None:
        """Pack carved images and write them; also fetches them from the device."""
        try:
            for batch in self.to_write:
                for carved in batch:
                    self._write_image(writer, carved)
        except BaseException:
            self.to_write.stop()
            raise

    def _write_image(self, writer: ShardWriter, carved: _Carved) -> None:
        started = time.perf_counter()
        tally, tokens, image = self.tally, carved.tokens, carved.image
        order = np.argsort(tokens.ranks.cpu().numpy(), kind="stable")
        by_rank = torch.from_numpy(order).to(tokens.features.device)
        try:
            packed = self.job.codec.pack(tokens.features[by_rank])
        except NonFiniteError as err:
            tally.rejected.append(
                RejectedSample(key=image.key, stage="encode", reason="non_finite", message=str(err))
            )
            return
        row = RowToWrite(
            key=image.key,
            content_hash=image.content_hash,
            packed=packed,
            positions=tokens.positions.cpu().numpy()[order].astype(np.uint32),
            sizes=tokens.sizes.cpu().numpy()[order].astype(np.float32),
            grid=(1, *carved.grid),
            image_size=image.image_size,
            columns=image.columns,
        )
        ready = time.perf_counter()
        writer.write(row)
        tally.num_written += 1
        tally.tokens_kept += packed.num_tokens
        tally.bytes_tokens += len(packed.tokens) + len(packed.aux) + 8 * packed.num_tokens
        tally.seconds["pack"] += ready - started
        tally.seconds["write"] += time.perf_counter() - ready


_NO_PIXELS: Pixels = np.zeros((0, 0, 3), np.uint8)


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _reject(err: SampleError) -> RejectedSample:
    return RejectedSample(key=err.key, stage=err.stage, reason=err.reason, message=str(err))


def _text(sample: Sample, name: str) -> str | None:
    raw = sample.columns.get(name)
    if raw is None:
        return None
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as err:
        raise SampleError(
            f"member .{name} is not UTF-8 text at byte {err.start}: repair it, or leave {name!r} "
            "out of input.columns",
            key=sample.key,
            reason="column_not_utf8",
        ) from err


def _timed(items: Iterator[T], seconds: defaultdict[str, float], stage: str) -> Iterator[T]:
    """Yield from `items`, adding the time each takes to arrive to `seconds[stage]`."""
    while True:
        started = time.perf_counter()
        item = next(items, None)
        seconds[stage] += time.perf_counter() - started
        if item is None:
            return
        yield item
