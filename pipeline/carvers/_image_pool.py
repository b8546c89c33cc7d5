"""Linear algebra image by image on a CPU's cores, and part by part of a batch on a GPU.

On a CPU one image has one core, and as many images run at once as there are threads.

An image is too little work for several cores. One core each also makes the result independent of
the number of threads and of batch-mates.
"""

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]
from torch import Tensor

Result = TypeVar("Result")

_CHUNK_BYTES = 512 * 2**20  # 27 images of 576 x 4096

_one_blas_thread = threading.Lock()  # the limit holds for the whole process


def map_images(function: Callable[..., Result], *matrices_BND: Tensor) -> list[Result]:
    """Return what a function that computes with NumPy returns for each image of CPU batches."""
    workers = max(1, min(len(matrices_BND[0]), torch.get_num_threads()))
    with _one_blas_thread, _blas().limit(limits=1), ThreadPoolExecutor(workers) as pool:
        return list((pool.map if workers > 1 else map)(function, *matrices_BND))


def in_float64(
    function: Callable[[Tensor], Tensor], matrix_BND: Tensor, *, values_per_image: int
) -> Tensor:
    """Return what a batched function gives for a batch in float64, joined along the images.

    The batch is cut into parts, so that the float64 copies of each stay below 512 MiB.

    Args:
        function: from (b, N, D) float64 to (b, *).
        matrix_BND: any float dtype.
        values_per_image: float64 numbers that it makes of an image at once.
    """
    images = max(1, _CHUNK_BYTES // (8 * values_per_image))
    return torch.cat([function(part.double()) for part in torch.split(matrix_BND, images)])


def product(left_BNX: Tensor, right_BXM: Tensor) -> Tensor:
    """Return the (B, N, M) products of two batches of matrices, the same for any batch.

    On a CPU each image's product runs on one core: torch's batched product rounds differently with
    the number of threads and images. NumPy also does half the work where the right matrix is the
    left one transposed (1.7 times as fast at 576 x 1024, one thread).

    Args:
        left_BNX: float32 or float64.
        right_BXM: of the same dtype and device.
    """
    if left_BNX.device.type != "cpu":
        return left_BNX @ right_BXM
    num_images, rows, columns = len(left_BNX), left_BNX.shape[1], right_BXM.shape[2]
    result_BNM = left_BNX.new_empty(num_images, rows, columns)
    map_images(_multiply, left_BNX.detach(), right_BXM.detach(), result_BNM)
    return result_BNM


def _multiply(left_NX: Tensor, right_XM: Tensor, result_NM: Tensor) -> None:
    np.matmul(left_NX.numpy(), right_XM.numpy(), out=result_NM.numpy())


@functools.cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController().select(user_api="blas")
