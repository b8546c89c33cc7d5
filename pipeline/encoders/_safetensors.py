"""Read single tensors of a safetensors file by byte range, or a sample of them.

The file is never mapped: mapped pages count as resident memory until the file is closed, and a
sharded 14 GB checkpoint would then cost more than the 0.6 GB of it that is wanted.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from pipeline.errors import ConfigError

MAX_HEADER_BYTES = 100_000_000  # the limit the reference implementation sets
SAMPLE_BYTES = 4096
_MAX_LENGTH = 1 << 40  # of an axis

_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies."""

    dtype: str  # as the format spells it, for example `BF16`
    shape: tuple[int, ...]
    start: int  # bytes from the begin of the file
    stop: int


class SafetensorsFile:
    """One safetensors file; only its header is read before a tensor is asked for.

    Args:
        path: of the file.

    Raises:
        ConfigError: the file is missing, cut short, or not a safetensors file (on first use).
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def entries(self) -> Mapping[str, TensorEntry]:
        """Every tensor of the file, by name."""
        header, base, size = self._header()
        entries = {}
        for name, fields in header.items():
            if name != "__metadata__":
                entries[name] = self._entry(name, fields, base=base, size=size)
        return entries

    def read(self, name: str, *, part: int = 0, parts: int = 1) -> Tensor:
        """Read one tensor, or one of `parts` equal slices of its first axis, to the CPU.

        Raises:
            ConfigError: it is stored as something else than floats, or the file ends early.
        """
        entry = self.entries[name]
        shape = entry.shape
        if parts > 1:
            if not shape or shape[0] % parts:
                raise ConfigError(f"tensor {name!r} of {self.path} does not split into {parts}")
            shape = (shape[0] // parts, *shape[1:])
        tensor = torch.empty(shape, dtype=self._dtype(name))
        with self.path.open("rb", buffering=0) as file:
            self._read_into(file, tensor, entry.start + part * tensor.nbytes)
        return tensor

    def read_rows(self, name: str, rows: Sequence[int]) -> Tensor:
        """Read some rows of a matrix, in the order given, touching no others.

        Raises:
            ConfigError: a row is out of range, or as for `read`.
        """
        entry = self.entries[name]
        tensor = torch.empty((len(rows), *entry.shape[1:]), dtype=self._dtype(name))
        if not rows or not 0 <= min(rows) <= max(rows) < entry.shape[0]:
            raise ConfigError(
                f"tensor {name!r} of {self.path} has {entry.shape[0]} rows, asked for {list(rows)}"
            )
        with self.path.open("rb", buffering=0) as file:
            for place, row in enumerate(rows):
                self._read_into(file, tensor[place], entry.start + row * tensor[place].nbytes)
        return tensor

    def sample(self, name: str) -> bytes:
        """Return what identifies a tensor: its type, its shape, and 4 KiB from its middle."""
        entry = self.entries[name]
        wanted = min(SAMPLE_BYTES, entry.stop - entry.start)
        with self.path.open("rb", buffering=0) as file:
            file.seek((entry.start + entry.stop - wanted) // 2)
            return f"{entry.dtype}{list(entry.shape)}".encode() + file.read(wanted)

    def _header(self) -> tuple[dict[str, Any], int, int]:
        try:
            size = self.path.stat().st_size
            with self.path.open("rb") as file:
                prefix = file.read(8)
                length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
                if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                    raise ConfigError(
                        f"{self.path} is not a safetensors file or is cut short: "
                        f"header of {length} bytes in a file of {size}; download it again"
                    )
                header = json.loads(file.read(length))
        except OSError as err:
            raise ConfigError(f"cannot read {self.path}: {err.strerror}") from err
        except (ValueError, RecursionError) as err:
            if isinstance(err, ConfigError):
                raise
            raise ConfigError(f"header of {self.path} is not JSON: {err}") from err
        if not isinstance(header, dict):
            raise ConfigError(f"header of {self.path} is not a JSON object; download it again")
        return header, 8 + length, size

    def _entry(self, name: str, fields: object, *, base: int, size: int) -> TensorEntry:
        try:
            shape = tuple(int(n) for n in fields["shape"])  # type: ignore[index]
            start, stop = (base + int(n) for n in fields["data_offsets"])  # type: ignore[index]
            dtype = str(fields["dtype"])  # type: ignore[index]
        except (KeyError, TypeError, ValueError) as err:
            raise ConfigError(f"header of {self.path} is damaged at tensor {name!r}") from err
        known = _DTYPES.get(dtype)
        wrong = known is not None and stop - start != math.prod(shape) * known.itemsize
        wrong = wrong or not 0 <= min(shape, default=0) <= max(shape, default=0) <= _MAX_LENGTH
        if wrong or not base <= start <= stop <= size:
            raise ConfigError(
                f"tensor {name!r} of {self.path} does not fit its file: {dtype}{list(shape)} at "
                f"bytes {start}..{stop} of {size}; download it again"
            )
        return TensorEntry(dtype, shape, start, stop)

    def _dtype(self, name: str) -> torch.dtype:
        spelled = self.entries[name].dtype
        if spelled not in _DTYPES:
            raise ConfigError(
                f"tensor {name!r} of {self.path} is stored as {spelled}; only "
                f"{', '.join(_DTYPES)} are read: use an unquantised checkpoint"
            )
        return _DTYPES[spelled]

    def _read_into(self, file: IO[bytes], tensor: Tensor, offset: int) -> None:
        if not tensor.nbytes:
            return
        view = memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        file.seek(offset)
        while len(view):
            count = file.readinto(view)  # type: ignore[attr-defined]
            if not count:
                raise ConfigError(f"{self.path} ends early; download it again")
            view = view[count:]
