"""Bytes in shared memory, where they go from one process to another without a copy."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def shared_memory(num_bytes: int) -> NDArray[np.uint8]:
    """Return (num_bytes,) in shared memory, so that what is read there goes to another process."""
    storage = torch.UntypedStorage._new_shared(max(1, num_bytes))  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()[:num_bytes]


def tensor_of(values: NDArray[np.uint8]) -> Tensor:
    """Return bytes as a tensor, one of the shared memory that they lie in if they do."""
    base = values.base
    while isinstance(base, np.ndarray):
        base = base.base
    if not isinstance(base, Tensor):
        return torch.from_numpy(values)
    offset = values.ctypes.data - base.data_ptr()
    return base.view(-1)[offset : offset + len(values)]
