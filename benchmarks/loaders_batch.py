"""A batch as every loader of `loaders.py` must give it, and how rows are joined to one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from benchmarks.loaders_inputs import WIDTH

BATCH_ROWS = 64
_PAGE_BYTES = 4096
_NUMPY = {torch.int8: np.int8, torch.float32: np.float32, torch.int32: np.int32}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedBatch:
    """Rows in the consumer's process, in memory of its own, codes not unpacked."""

    keys: list[str]
    num_tokens: list[int]
    codes: Tensor  # (sum of K, D) int8: row after row
    scales: Tensor  # (sum of K,) float32
    positions: Tensor  # (sum of K,) int32
    sizes: Tensor  # (sum of K,) float32

    @property
    def rectangle(self) -> Tensor:
        """The codes as (B, K, D); all rows must have K tokens."""
        return self.codes.view(len(self.keys), -1, WIDTH)

    def touch(self) -> int:
        """Read one byte of every page of the codes, so that they are there."""
        return int(self.codes.view(-1)[::_PAGE_BYTES].sum())


def join(
    keys: Sequence[str], codes: Sequence[Any], aux: Sequence[Any], *, is_owned: bool = False
) -> LoadedBatch:
    """Join rows whose scales, positions and sizes lie together, as `Row.aux` has them.

    Args:
        keys: of the rows.
        codes: buffers that hold the rows' codes one after the other, one a row or fewer.
        aux: one buffer a row.
        is_owned: the buffers are nobody else's memory: a single one need not be copied.
    """
    parts = [np.frombuffer(piece, np.float32).reshape(3, -1) for piece in aux]
    return join_parts(
        keys,
        codes,
        [part[0] for part in parts],
        [part[1] for part in parts],
        [part[2] for part in parts],
        is_owned=is_owned,
    )


def join_parts(
    keys: Sequence[str],
    codes: Sequence[Any],
    scales: Sequence[Any],
    positions: Sequence[Any],
    sizes: Sequence[Any],
    *,
    is_owned: bool = False,
) -> LoadedBatch:
    """Join rows given as one buffer a row and part; see `join`."""
    return LoadedBatch(
        keys=list(keys),
        num_tokens=[len(memoryview(piece).cast("B")) // 4 for piece in scales],
        codes=_tensor(codes, torch.int8, is_owned=is_owned).view(-1, WIDTH),
        scales=_tensor(scales, torch.float32),
        positions=_tensor(positions, torch.int32),
        sizes=_tensor(sizes, torch.float32),
    )


def _tensor(pieces: Sequence[Any], dtype: torch.dtype, *, is_owned: bool = False) -> Tensor:
    arrays = [np.frombuffer(piece, np.uint8) for piece in pieces]
    if is_owned and len(arrays) == 1 and get_worker_info() is None:
        return torch.from_numpy(arrays[0].view(_NUMPY[dtype]))
    joined = _empty(sum(len(array) for array in arrays))
    np.concatenate(arrays, out=joined.numpy())
    return joined.view(dtype)


def _empty(num_bytes: int) -> Tensor:
    """Return memory; in a worker shared memory, as torch's own collate takes it."""
    if get_worker_info() is None:
        return torch.empty(num_bytes, dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(num_bytes, device="cpu")
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (num_bytes,))
