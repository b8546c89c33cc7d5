"""Open a cache and read images back as tensors: the cache's bytes joined with its codec."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from pipeline import codecs
from pipeline.cache import commit, layout, snapshot
from pipeline.cache.reader import SnapshotReader
from pipeline.cache.row_batch import RowBatch
from pipeline.codecs import Codec
from pipeline.storage import DiskCache, Store, open_cached_store, open_store
from pipeline.types import TileLayout
from pipeline.unpacked_rows import UnpackedRows, unpack_rows

logger = logging.getLogger(__name__)

_MOST_TOKENS = 2**32 - 1  # that a row can have: what is reckoned with them fits 64 bits


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedImage:
    """The kept tokens of one image, in position order, with the names `CarvedTokens` has."""

    key: str
    features: Tensor  # (K, D)
    positions: Tensor  # (K,) int64, ascending: place in the grid, row by row
    sizes: Tensor  # (K,) float32: how many source tokens each stands for
    ranks: Tensor  # (K,) int64: 0 is the most important
    grid: tuple[int, int, int]  # time, rows, columns before carving
    width: int  # of the image, in pixels
    height: int
    tiles: TileLayout | None = None  # of a tiled image; its views are what the grid calls time


def open_cache(
    url: str,
    *,
    keep_tokens: int | None = None,
    snapshot_number: int | None = None,
    disk_cache: DiskCache | None = None,
) -> "CarvedCache":
    """Open a cache at one moment of its life.

    Args:
        url: of the cache: a folder, `s3://...`, `gs://...`, `memory://...`.
        keep_tokens: give at most this many tokens an image, the most important ones, and fetch
            only their bytes; at least 1. None for all that are stored.
        snapshot_number: an older snapshot; None for the latest, or, where none was made yet, for
            the shards committed now.
        disk_cache: where to keep what is read of a remote cache, for every reader of this machine;
            None to keep nothing.

    Raises:
        CacheFormatError: there is no cache, or it is of a newer format.
        ValueError: `keep_tokens` is below 1.
    """
    _check_keep_tokens(keep_tokens)
    store = _open_store(url, disk_cache)
    identity = commit.read_identity(store)
    cache = CarvedCache(reader=_open_reader(store, snapshot_number), identity=identity)
    return cache if keep_tokens is None else cache.keeping(keep_tokens)


@dataclass(kw_only=True)
class CarvedCache:
    """A mapping from key to `CachedImage`, immutable while open. Made by `open_cache`."""

    reader: SnapshotReader
    identity: Mapping[str, Any]
    keep_tokens: int | None = None
    _warned: bool = field(default=False, repr=False)

    def keeping(self, keep_tokens: int) -> "CarvedCache":
        """Return this cache with at most so many tokens an image, the most important ones.

        Says once for each opened cache if that is an approximation.

        Raises:
            ValueError: `keep_tokens` is below 1.
        """
        _check_keep_tokens(keep_tokens)
        if not self.identity["nested"] and not self._warned:
            logger.warning(
                "%s: carver %s is not nested; its best %d tokens are not what carving to %d would "
                "give",
                self.reader.store.url,
                self.identity["settings"]["carver"]["name"],
                keep_tokens,
                keep_tokens,
            )
            self._warned = True
        return replace(self, keep_tokens=min(keep_tokens, _MOST_TOKENS))

    def refresh(self) -> "CarvedCache":
        """Return this cache as it is now: with the shards of the latest snapshot.

        An open cache stays as it was opened while jobs add to it; so do datasets made of it.
        """
        return replace(self, reader=_open_reader(self.reader.store))

    @cached_property
    def codec(self) -> Codec:
        """The codec the cache was packed with."""
        settings = self.identity["settings"]["codec"]
        return codecs.build(settings["name"], settings["options"])

    @property
    def width(self) -> int:
        """D of the features."""
        return int(self.identity["settings"]["width"])

    def __len__(self) -> int:
        return len(self.reader)

    def __iter__(self) -> Iterator[str]:
        return self.keys()

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self.reader.contains(key)

    def keys(self) -> Iterator[str]:
        """Yield all keys, sorted."""
        return self.reader.keys()

    def __getitem__(self, key: str) -> CachedImage:
        """Return one image.

        Raises:
            KeyNotFoundError: no such key.
            CacheFormatError: its bytes are damaged.
        """
        return self.get_many([key])[0]

    def get_many(
        self,
        keys: Sequence[str],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> list[CachedImage]:
        """Return several images, unpacked together on `device`."""
        places = self.reader.find_many(keys)
        rows = self.reader.read_in_parallel(places, self.keep_tokens)
        return unpack_images(self.codec, rows, device=device, dtype=dtype)

    def columns(self, key: str, columns: Sequence[str]) -> dict[str, Any]:
        """Return other columns of one image, the user's own among them."""
        return self.reader.read_columns(self.reader.find(key), columns)

    def scan(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield the stored rows, a row group at a time, as Arrow record batches.

        Args:
            columns: which to read; None for all. `tokens` and `aux` come as stored.
        """
        return self.reader.scan(columns)


def unpack_images(
    codec: Codec,
    rows: RowBatch,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> list[CachedImage]:
    """Turn stored rows into images; the codes travel to the device, not the floats.

    Args:
        codec: they were packed with.
        rows: of a cache.
        device: where the features are wanted.
        dtype: of the features.

    Raises:
        CacheFormatError: a row is damaged.
    """
    if not len(rows):
        return []
    unpacked = unpack_rows(codec, rows, device=device, dtype=dtype)
    lengths = rows.num_tokens.tolist()
    pieces = zip(
        rows.places,
        *(torch.split(t, lengths) for t in _tensors(unpacked)),
        rows.tiles or [None] * len(rows),
        strict=True,
    )
    return [
        CachedImage(
            key=place.key,
            features=features,
            positions=positions,
            sizes=sizes,
            ranks=ranks,
            grid=(place.grid_t, place.grid_h, place.grid_w),
            width=place.width,
            height=place.height,
            tiles=tiles,
        )
        for place, features, positions, sizes, ranks, tiles in pieces
    ]


def _tensors(unpacked: UnpackedRows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return unpacked.features, unpacked.positions, unpacked.sizes, unpacked.ranks


def _open_store(url: str, disk_cache: DiskCache | None) -> Store:
    if disk_cache is None:
        return open_store(url)
    return open_cached_store(url, disk_cache, is_immutable=layout.is_immutable)


def _open_reader(store: Store, snapshot_number: int | None = None) -> SnapshotReader:
    if snapshot_number is not None:
        return SnapshotReader(store=store, snapshot=snapshot.read_snapshot(store, snapshot_number))
    if latest := snapshot.latest_snapshot(store):
        return SnapshotReader(store=store, snapshot=latest)
    found, tables = snapshot.collect_snapshot(store)
    return SnapshotReader(store=store, snapshot=found, tables=tables)


def _check_keep_tokens(keep_tokens: int | None) -> None:
    if keep_tokens is not None and keep_tokens < 1:
        raise ValueError(f"keep_tokens={keep_tokens}: must be at least 1, or None for all")
