"""A batch of a cache's rows: codes on the CPU, tensors wherever they are wanted."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.cache import row_batch
from pipeline.cache.fetched_rows import DamagedRow
from pipeline.cache.row_batch import RowBatch
from pipeline.cache.row_place import RowPlace
from pipeline.carved_cache import CachedImage, CarvedCache, unpack_images
from pipeline.codecs import Codec
from pipeline.dataset import columns
from pipeline.dataset.columns import Columns
from pipeline.dataset.shared_memory import SharedBytes
from pipeline.errors import CacheFormatError
from pipeline.unpacked_rows import UnpackedRows, unpack_rows


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
    max_seqlen: int  # the largest K


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Rows of a cache, checked and still packed, with what it takes to unpack them.

    `rows` holds keys and places; a pickled batch carries its own rows alone, its codes in shared
    memory where it goes to another process.

    Attributes:
        state: where the epoch stands once this batch was used; `load_state_dict` of the dataset
            takes it, on any number of ranks and workers. None where a batch is no step of one.
        damaged: rows that were left out because they are damaged.
    """

    codec: Codec
    rows: RowBatch
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    state: Mapping[str, Any] | None = None
    damaged: Sequence[DamagedRow] = ()

    @classmethod
    def of_keys(
        cls, cache: CarvedCache, keys: Sequence[str], *, columns: Sequence[str] = ()
    ) -> "Batch":
        """Read rows by key, each by one ranged read of the tokens that are wanted.

        Args:
            cache: made by `open_cache`.
            keys: of the rows; adjacent ones are read together.
            columns: of the cache, to give with them.

        Raises:
            KeyNotFoundError: no such key.
            CacheFormatError: a row is damaged.
            StorageError: the store cannot be read.
        """
        places = cache.reader.find_many(keys)
        return cls(
            codec=cache.codec,
            rows=cache.reader.read_in_parallel(places, cache.keep_tokens),
            columns=Columns(cache.reader, columns).of(places),
        )

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> "Iterator[PackedRow]":
        """Yield its rows, which refer to it."""
        return (PackedRow(batch=self, number=number) for number in range(len(self)))

    def __getstate__(self) -> dict[str, Any]:
        """Travel to another process: the codes by shared memory, where a queue leads there."""
        rows = replace(self.rows, tokens=np.empty(0, np.uint8))
        return {**self.__dict__, "rows": rows, "tokens": SharedBytes(self.rows.tokens)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        tokens = state.pop("tokens")
        self.__dict__.update(state, rows=replace(state["rows"], tokens=tokens))

    @property
    def keys(self) -> list[str]:
        """Keys, in the order of the batch."""
        keys: list[str] = self.rows.places.keys.tolist()
        return keys

    @property
    def places(self) -> list[RowPlace]:
        """Where each row lies, with the grid and the size of its image."""
        return list(self.rows.places)

    @property
    def num_tokens(self) -> Tensor:
        """(B,) int64 K of each row."""
        return torch.from_numpy(self.rows.num_tokens)

    @property
    def codes(self) -> Tensor:
        """(sum of K, bytes a token) uint8: packed tokens as stored, most important first."""
        shape = (int(self.rows.num_tokens.sum()), self.rows.token_bytes)
        return torch.from_numpy(self.rows.tokens).view(shape)

    def pin_memory(self) -> "Batch":
        """Return the batch with its codes in pinned memory; a DataLoader calls this."""
        pinned = torch.from_numpy(self.rows.tokens).pin_memory().numpy()
        return replace(self, rows=replace(self.rows, tokens=pinned))

    def images(
        self, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> list[CachedImage]:
        """Unpack on `device`, one `CachedImage` each."""
        return unpack_images(self.codec, self.rows, device=device, dtype=dtype)

    def packed(
        self, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> RaggedTokens:
        """Unpack on `device`, image after image.

        Raises:
            CacheFormatError: a row is damaged, or there is none.
        """
        unpacked = self._unpacked(device, dtype)
        return RaggedTokens(
            features=unpacked.features,
            cu_seqlens=torch.from_numpy(unpacked.starts).to(
                device, dtype=torch.int32, non_blocking=True
            ),
            positions=unpacked.positions.to(device, non_blocking=True),
            sizes=unpacked.sizes.to(device, non_blocking=True),
            max_seqlen=int(self.rows.num_tokens.max()),
        )

    def padded(
        self, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> PaddedTokens:
        """Unpack on `device` into a rectangle.

        Raises:
            CacheFormatError: a row is damaged, or there is none.
        """
        unpacked, lengths = self._unpacked(device, dtype), self.rows.num_tokens
        longest = int(lengths.max())
        mask = torch.from_numpy(np.arange(longest)[None, :] < lengths[:, None]).to(device)
        pieces = (unpacked.features, unpacked.positions.to(device), unpacked.sizes.to(device))
        features, positions, sizes = (_rectangle(piece, mask) for piece in pieces)
        return PaddedTokens(features=features, mask=mask, positions=positions, sizes=sizes)

    def _unpacked(self, device: torch.device | str, dtype: torch.dtype) -> UnpackedRows:
        if not len(self):
            raise CacheFormatError(
                f"a batch without rows cannot be unpacked; {len(self.damaged)} were damaged"
            )
        return unpack_rows(self.codec, self.rows, device=device, dtype=dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedRow:
    """One row of a batch that was read; a pickled one carries its own bytes alone."""

    batch: Batch
    number: int  # in the batch

    def __getstate__(self) -> dict[str, Any]:
        return {"batch": select(self.batch, [self.number]), "number": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @property
    def key(self) -> str:
        """The image's key."""
        return self.batch.rows.places.key(self.number)

    @property
    def num_tokens(self) -> int:
        """K of the row."""
        return int(self.batch.rows.num_tokens[self.number])

    @property
    def place(self) -> RowPlace:
        """Where the row lies, with the grid and the size of its image."""
        return self.batch.rows.places.place(self.number)

    @property
    def columns(self) -> dict[str, Any]:
        """Its columns that were asked for."""
        return {name: values[self.number] for name, values in self.batch.columns.items()}


def select(batch: Batch, numbers: Sequence[int]) -> Batch:
    """Return some rows of a batch, copied."""
    return Batch(
        codec=batch.codec,
        rows=batch.rows.take(np.array(numbers, np.int64)),
        columns={name: [values[n] for n in numbers] for name, values in batch.columns.items()},
    )


def collate(rows: Sequence[PackedRow]) -> Batch:
    """Put rows together, in their order; those of one batch in a run are copied at once.

    Raises:
        ValueError: there are none.
    """
    if not rows:
        raise ValueError("a batch of no rows; give at least one")
    runs: list[tuple[Batch, list[int]]] = []
    for row in rows:
        if not runs or runs[-1][0] is not row.batch:
            runs.append((row.batch, []))
        runs[-1][1].append(row.number)
    if len(runs) == 1 and runs[0][1] == list(range(len(runs[0][0]))):
        return replace(runs[0][0], state=None)
    pieces = [select(batch, numbers) for batch, numbers in runs]
    if len(pieces) == 1:
        return pieces[0]
    return Batch(
        codec=pieces[0].codec,
        rows=row_batch.joined([p.rows for p in pieces]),
        columns=columns.joined([p.columns for p in pieces]),
    )


def _rectangle(values: Tensor, mask: Tensor) -> Tensor:
    """Return (B, K, ...) with the values where the mask is True, and zeros elsewhere."""
    if len(values) == mask.numel():
        return values.view(*mask.shape, *values.shape[1:])
    out = torch.zeros(*mask.shape, *values.shape[1:], dtype=values.dtype, device=values.device)
    out[mask] = values
    return out
