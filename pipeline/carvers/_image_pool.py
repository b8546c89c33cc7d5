"""Linear algebra of one image on one core, as many images at once as there are threads.

An image is too little work for several cores. One core each also makes the result independent of
the number of threads and of batch-mates.
"""

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]
from torch import Tensor

Result = TypeVar("Result")

_one_blas_thread = threading.Lock()  # the limit holds for the whole process


def map_images(function: Callable[[Tensor], Result], matrix_BND: Tensor) -> list[Result]:
    """Return what a function that computes with NumPy returns for each image of a CPU batch."""
    workers = max(1, min(len(matrix_BND), torch.get_num_threads()))
    with _one_blas_thread, _blas().limit(limits=1), ThreadPoolExecutor(workers) as pool:
        return list((pool.map if workers > 1 else map)(function, matrix_BND))


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")
