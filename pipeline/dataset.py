"""A torch dataset over a cache: packed rows from worker processes, tensors on the device.

Worker processes only fetch and check bytes. The codes travel, and `Batch.padded` or
`Batch.packed` unpacks them where they are wanted:

    dataset = CarvedDataset(open_cache(url), shuffle=True, seed=0)
    loader = DataLoader(dataset, batch_size=64, num_workers=2, collate_fn=dataset.collate)
    for batch in loader:
        tokens = batch.padded(device="cuda")
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from pipeline.cache import row as row_bytes
from pipeline.cache.reader import RowPlace
from pipeline.cache.row import StoredTokens
from pipeline.carved_cache import CachedImage, CarvedCache, unpack_images
from pipeline.codecs import Codec


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRow:
    """One image as it comes out of a worker: checked, not yet unpacked."""

    place: RowPlace
    stored: StoredTokens
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The image's key."""
        return self.place.key


@dataclass(frozen=True, kw_only=True, slots=True)
class PaddedTokens:
    """A batch as a rectangle; rows shorter than the longest are padded with zeros."""

    features: Tensor  # (B, K, D)
    mask: Tensor  # (B, K) bool, True where there is a token
    positions: Tensor  # (B, K) int64; 0 in the padding
    sizes: Tensor  # (B, K) float32; 0 in the padding


@dataclass(frozen=True, kw_only=True, slots=True)
class RaggedTokens:
    """A batch as one sequence, for attention kernels that take `cu_seqlens`."""

    features: Tensor  # (sum of K, D)
    cu_seqlens: Tensor  # (B + 1,) int32: image b is rows cu_seqlens[b] to cu_seqlens[b + 1]
    positions: Tensor  # (sum of K,) int64
    sizes: Tensor  # (sum of K,) float32


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Rows put together by `CarvedDataset.collate`, with what it takes to unpack them."""

    codec: Codec
    rows: Sequence[PackedRow]

    @property
    def keys(self) -> list[str]:
        """Keys, in the order of the batch."""
        return [r.key for r in self.rows]

    @property
    def columns(self) -> dict[str, list[Any]]:
        """The asked columns, one list each, in the order of the batch."""
        return {name: [r.columns[name] for r in self.rows] for name in self.rows[0].columns}

    def images(
        self, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> list[CachedImage]:
        """Unpack on `device`, one `CachedImage` each."""
        places = [r.place for r in self.rows]
        stored = [r.stored for r in self.rows]
        return unpack_images(self.codec, places, stored, device=device, dtype=dtype)

    def packed(
        self, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> RaggedTokens:
        """Unpack on `device`, image after image."""
        images = self.images(device=device, dtype=dtype)
        lengths = torch.tensor([0, *(len(i.positions) for i in images)])
        return RaggedTokens(
            features=torch.cat([i.features for i in images]),
            cu_seqlens=lengths.cumsum(0).to(device=device, dtype=torch.int32),
            positions=torch.cat([i.positions for i in images]).to(device),
            sizes=torch.cat([i.sizes for i in images]).to(device),
        )

    def padded(
        self, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> PaddedTokens:
        """Unpack on `device` into a rectangle."""
        images = self.images(device=device, dtype=dtype)
        lengths = torch.tensor([len(i.positions) for i in images])
        mask = torch.arange(int(lengths.max()))[None, :] < lengths[:, None]
        return PaddedTokens(
            features=_pad([i.features for i in images]),
            mask=mask.to(device),
            positions=_pad([i.positions for i in images]).to(device),
            sizes=_pad([i.sizes for i in images]).to(device),
        )


class CarvedDataset(IterableDataset[PackedRow]):
    """Iterates over a cache; every row once over all ranks and workers together.

    The order of an epoch depends on `seed` and the epoch alone: row groups are permuted, then
    the rows within each. Rank r of R with W workers a rank cuts that order into R * W runs of
    equal length, give or take one row, and each worker reads one: so ranks may differ by a few
    rows at the end of an epoch, and none is padded or dropped. A worker holds up to 2 kB
    for each part of the cache (`benchmarks/scale.md`), and of the index no more than 2^20 rows.

    Args:
        cache: made by `open_cache`.
        keep_tokens: at most this many tokens an image, the most important; None for what the
            cache was opened with.
        shuffle: False for the order of storage.
        seed: of the shuffle.
        rank: of this process; None for that of `torch.distributed` where it is initialised, or 0.
        world_size: number of processes; None likewise, or 1.
        columns: user columns to give with each row.
    """

    def __init__(  # noqa: PLR0913  (each is an independent choice of the user)
        self,
        cache: CarvedCache,
        *,
        keep_tokens: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        columns: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.cache = cache if keep_tokens is None else cache.keeping(keep_tokens)
        self.shuffle = shuffle
        self.seed = seed
        self.columns = tuple(columns)
        self.epoch = 0
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.rank = rank if rank is not None else torch.distributed.get_rank() if distributed else 0
        if world_size is None:
            world_size = torch.distributed.get_world_size() if distributed else 1
        self.world_size = world_size
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank={self.rank}: must be in [0, world_size={self.world_size})")

    def set_epoch(self, epoch: int) -> None:
        """Choose the shuffle of the next iteration; call it before each epoch."""
        self.epoch = epoch

    def collate(self, rows: Sequence[PackedRow]) -> Batch:
        """Put rows together; give it to a DataLoader as `collate_fn`."""
        return Batch(codec=self.cache.codec, rows=list(rows))

    def __iter__(self) -> Iterator[PackedRow]:
        worker = get_worker_info()
        num_workers = worker.num_workers if worker else 1
        part = self.rank * num_workers + (worker.id if worker else 0)
        for places in self._runs(part, self.world_size * num_workers):
            yield from self._read(places)

    def _runs(self, part: int, num_parts: int) -> Iterator[Sequence[RowPlace]]:
        """Yield the rows of one part of this epoch, one row group after another."""
        reader = self.cache.reader
        files, groups, rows = reader.row_groups()
        paths = reader.files
        order = np.arange(len(rows))
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(len(rows))
        ends = np.cumsum(rows[order])
        cuts = np.linspace(0, ends[-1] if len(ends) else 0, num_parts + 1).astype(int)
        start, stop = cuts[part], cuts[part + 1]
        for place in range(int(np.searchsorted(ends, start, side="right")), len(order)):
            number = order[place]
            before = ends[place] - rows[number]
            if before >= stop:
                return
            places = reader.places_in(paths[files[number]], int(groups[number]))
            if self.shuffle:
                generator = np.random.default_rng([self.seed, self.epoch, int(number)])
                places = [places[i] for i in generator.permutation(len(places))]
            if mine := places[max(0, start - before) : stop - before]:
                yield mine

    def _read(self, places: Sequence[RowPlace]) -> Iterator[PackedRow]:
        """Fetch rows of one row group: as a whole, or by ranges where that is far less."""
        reader = self.cache.reader
        wanted = sum(self._num_bytes(place) for place in places)
        names = ["key", "tokens", "aux", *self.columns]
        if not self.columns and 2 * wanted < reader.row_group_bytes(places[0]):
            stored = reader.read_many(places, self.cache.keep_tokens)
            for place, tokens in zip(places, stored, strict=True):
                yield PackedRow(place=place, stored=tokens)
            return
        table = reader.read_row_group(places[0], names)
        for place in places:
            reader.check_key(table, place)
            values = {name: table[name][place.row] for name in names}
            tokens = reader.checked(
                place,
                memoryview(values["tokens"].as_buffer()),
                memoryview(values["aux"].as_buffer()),
                self.cache.keep_tokens,
            )
            given = {name: values[name].as_py() for name in self.columns}
            yield PackedRow(place=place, stored=tokens, columns=given)

    def _num_bytes(self, place: RowPlace) -> int:
        keep = self.cache.keep_tokens
        tokens = row_bytes.prefix_bytes(
            place.tokens_length, num_tokens=place.num_tokens, keep_tokens=keep
        )
        return tokens + place.aux_length


def _pad(pieces: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(pieces), batch_first=True)
