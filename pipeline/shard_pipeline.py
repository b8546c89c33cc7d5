"""The stages of one shard at work at once, joined by queues bounded in bytes.

reader thread -> decode threads -> the calling thread: encode, carve -> writer thread
"""

import hashlib
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch

from pipeline.byte_queue import ByteQueue, QueueStoppedError
from pipeline.cache.writer import RowToWrite, ShardWriter, text_bytes
from pipeline.decode import decode_image
from pipeline.encoders import Pixels
from pipeline.errors import NonFiniteError, SampleError, ShardAbandonedError
from pipeline.job import Job
from pipeline.source import read_shard
from pipeline.types import (
    CarvedTokens,
    RejectedSample,
    Sample,
    ShardRef,
    TileLayout,
    VisualTokens,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(kw_only=True)
class Stations:
    """What the shards in flight of one process share."""

    job: Job  # its encoder is loaded
    decoders: ThreadPoolExecutor
    packers: ThreadPoolExecutor
    queue_bytes: int  # bound of each queue of a shard
    device_turn: threading.Lock = field(default_factory=threading.Lock)
    on_progress: Callable[[int], None]
    prepared_bytes: int = 1 << 20  # of one preprocessed image; corrected by the first


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
    grid: tuple[int, int, int]  # views, rows, columns
    tiles: TileLayout | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _Packed:
    """One image after the codec: a row, or why there is none."""

    key: str
    row: RowToWrite | None
    problem: str = ""
    seconds: float = 0.0


@dataclass(kw_only=True)
class Tally:
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


class ShardPipeline:
    """The threads and queues of one shard.

    Args:
        stations: shared with the other shard in flight.
        shard: what to carve.
        batch_size: images per encoder call.
    """

    def __init__(self, stations: Stations, *, shard: ShardRef, batch_size: int) -> None:
        self.stations = stations
        self.job = stations.job
        self.shard = shard
        self.batch_size = batch_size
        self.tally = Tally()
        limit = stations.queue_bytes
        self.to_encode: ByteQueue[Future[_Prepared | RejectedSample]] = ByteQueue(limit)
        self.to_write: ByteQueue[list[_Carved]] = ByteQueue(limit)
        self._abandoned = threading.Event()

    def abandon(self) -> None:
        """End `run` as soon as what is under way lets it; may be called from any thread."""
        self._abandoned.set()
        self.to_encode.stop()
        self.to_write.stop()

    def check_wanted(self) -> None:
        """Raise if this attempt has been abandoned.

        Raises:
            ShardAbandonedError: it has.
        """
        if self._abandoned.is_set():
            raise ShardAbandonedError(f"the attempt at {self.shard.url} was abandoned")

    def run(self, writer: ShardWriter) -> Tally:
        """Carve all samples; on an error all threads end before it is raised.

        Raises:
            ShardAbandonedError: `abandon` was called; other errors are of the shard or the stores.
        """
        with ThreadPoolExecutor(2, thread_name_prefix="shard") as pool:
            reading = pool.submit(self._read)
            writing = pool.submit(self._write, writer)
            try:
                # One shard at a time has the device; the next one fills its queue meanwhile.
                with self.stations.device_turn:
                    self._encode()
                self.to_write.close()
                writing.result()
            except QueueStoppedError:
                self.check_wanted()
                writing.result()  # the writer failed and stopped the queue: raise its error
                raise
            finally:
                self.to_encode.stop()
                self.to_write.stop()
            reading.result()
        self.check_wanted()  # stopped queues look as if the shard were at its end
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
                    cost = len(sample.image) + self.stations.prepared_bytes
                    cost += sum(map(len, sample.columns.values()))
                    self.to_encode.put(self.stations.decoders.submit(self._prepare, sample), cost)
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
            pixels = self.job.encoder.preprocess(image)
        except SampleError as err:
            # A preprocessor does not know the key of what it is given.
            return RejectedSample(
                key=sample.key, stage=err.stage, reason=err.reason, message=str(err)
            )
        self.stations.prepared_bytes = pixels.nbytes
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
                for index, tokens in self._carve(group, batch):
                    image = replace(batch[index], pixels=_NO_PIXELS)
                    grid = (group.num_views, *group.grid)
                    carved[index] = _Carved(
                        image=image, tokens=tokens, grid=grid, tiles=group.tiles
                    )
                self.tally.tokens_full += group.features.shape[0] * group.features.shape[1]
            seconds["encode"] += encoded - started
            seconds["carve"] += time.perf_counter() - encoded
            done = [c for c in carved if c is not None]
            num_bytes = sum(
                _num_bytes(c.tokens.features) + text_bytes(c.image.columns) for c in done
            )
            self.to_write.put(done, num_bytes)
            self.stations.on_progress(len(batch))

    def _carve(self, group: VisualTokens, batch: list[_Prepared]) -> list[tuple[int, CarvedTokens]]:
        """Carve one group; return each result with its place in the batch."""
        indices = list(group.image_indices or range(len(batch)))
        try:
            return list(zip(indices, self.job.carver.carve(group), strict=True))
        except NonFiniteError:
            # Looked for only now: the check costs a pass over all values of a good batch.
            finite = _finite_images(group)
            if all(finite):
                raise
        good = [place for place, is_finite in enumerate(finite) if is_finite]
        for place, is_finite in enumerate(finite):
            if not is_finite:
                self._reject_non_finite(batch[indices[place]].key, _NON_FINITE)
        if not good:
            return []
        kept = replace(
            group,
            features=group.features[good],
            signals={name: values[good] for name, values in group.signals.items()},
            image_indices=tuple(indices[place] for place in good),
        )
        return self._carve(kept, batch)

    def _reject_non_finite(self, key: str, message: str) -> None:
        self.tally.rejected.append(
            RejectedSample(key=key, stage="encode", reason="non_finite", message=message)
        )

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
        seconds, packers = self.tally.seconds, self.stations.packers
        try:
            for batch in self.to_write:
                started = time.perf_counter()
                tokens = _to_host([carved.tokens for carved in batch])
                fetched = time.perf_counter()
                # Several threads: behind a fast GPU one could not keep up.
                packing = [
                    packers.submit(self._pack, replace(carved, tokens=on_host))
                    for carved, on_host in zip(batch, tokens, strict=True)
                ]
                for row in [future.result() for future in packing]:
                    seconds["pack"] += row.seconds
                    self._write_row(writer, row)
                seconds["fetch"] += fetched - started
        except BaseException:
            self.to_write.stop()
            raise

    def _pack(self, carved: _Carved) -> _Packed:
        """Pack one image, most important token first; runs in a packing thread."""
        started = time.perf_counter()
        tokens, image = carved.tokens, carved.image
        order = np.argsort(tokens.ranks.numpy(), kind="stable")
        try:
            packed = self.job.codec.pack(tokens.features[torch.from_numpy(order)])
        except NonFiniteError as err:
            return _Packed(key=image.key, row=None, problem=str(err))
        row = RowToWrite(
            key=image.key,
            content_hash=image.content_hash,
            packed=packed,
            positions=tokens.positions.numpy()[order].astype(np.uint32),
            sizes=tokens.sizes.numpy()[order].astype(np.float32),
            grid=carved.grid,
            tiles=carved.tiles,
            image_size=image.image_size,
            columns=image.columns,
        )
        return _Packed(key=image.key, row=row, seconds=time.perf_counter() - started)

    def _write_row(self, writer: ShardWriter, packed: _Packed) -> None:
        tally, row = self.tally, packed.row
        if row is None:
            self._reject_non_finite(packed.key, packed.problem)
            return
        started = time.perf_counter()
        writer.write(row)
        tally.num_written += 1
        tally.tokens_kept += row.packed.num_tokens
        tally.bytes_tokens += len(row.packed.tokens) + len(row.packed.aux) + len(row.packed.head)
        tally.bytes_tokens += 8 * row.packed.num_tokens  # positions and sizes
        tally.seconds["write"] += time.perf_counter() - started


_NON_FINITE = "features or signals hold NaN or infinity"
_NO_PIXELS: Pixels = np.zeros((0, 0, 3), np.uint8)


def _finite_images(group: VisualTokens) -> list[bool]:
    """Return for each image of a group whether all its numbers are finite."""
    finite = [
        values.isfinite().flatten(1).all(dim=1)
        for values in (group.features, *group.signals.values())
    ]
    return [bool(value) for value in torch.stack(finite).all(dim=0).tolist()]


def _to_host(batch: list[CarvedTokens]) -> list[CarvedTokens]:
    """Fetch a batch from the device by one copy of each kind, not one an image."""
    if all(tokens.features.is_cpu for tokens in batch):
        return batch
    lengths = [len(tokens.positions) for tokens in batch]
    columns = [
        torch.split(torch.cat([getattr(tokens, name) for tokens in batch]).cpu(), lengths)
        for name in ("features", "positions", "sizes", "ranks")
    ]
    return [
        CarvedTokens(features=f, positions=p, sizes=s, ranks=r)
        for f, p, s, r in zip(*columns, strict=True)
    ]


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


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
