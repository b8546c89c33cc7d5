"""What an error of an actor says about the shard, the actor and the batch."""

from enum import Enum

import torch

from pipeline.errors import ConfigError, ShardError, StorageError, without_secrets

# What allocators say in a plain RuntimeError; compared in lower case.
_MEMORY_WORDINGS = (
    "out of memory",  # CUDA, HIP, MPS, XPU
    "defaultcpuallocator: can't allocate memory",
    "defaultcpuallocator: not enough memory",
    "cannot allocate memory",  # mmap, POSIX
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
    "cusolver_status_alloc_failed",
)

OUT_OF_MEMORY = "out_of_memory"


class Remedy(Enum):
    """What is to be done about an error."""

    STOP = "end the run: the configuration is wrong"
    GIVE_UP = "the shard is at fault: trying again would not help"
    RETRY = "the shard again, on the same actor or another"
    SMALLER_BATCH = "the shard again with a smaller batch"
    REPLACE_ACTOR = "the shard again, on a new actor: the process may be spoiled"


def diagnose(cause: BaseException, *, batch_size: int) -> tuple[Remedy, str]:
    """Return what to do about an error, and its reason: a short stable code.

    Args:
        cause: as the actor raised it.
        batch_size: of the call that raised it.
    """
    if isinstance(cause, ConfigError):
        return Remedy.STOP, "config"
    if isinstance(cause, ShardError):
        return Remedy.GIVE_UP, cause.reason
    if isinstance(cause, StorageError):
        return Remedy.RETRY, "storage"
    if is_out_of_memory(cause):
        # An allocator that failed once may have left its process in pieces.
        return (Remedy.SMALLER_BATCH if batch_size > 1 else Remedy.REPLACE_ACTOR), OUT_OF_MEMORY
    return Remedy.REPLACE_ACTOR, type(cause).__name__


def is_out_of_memory(cause: BaseException) -> bool:
    """Tell whether an error says that memory ran out, of the device or of the host.

    Libraries below torch raise plain RuntimeErrors, known by their wording. Errors that memory may
    have caused and that do not say so (`CUDNN_STATUS_NOT_SUPPORTED`, an illegal access) are none.
    """
    if isinstance(cause, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(cause).lower()
    return isinstance(cause, RuntimeError) and any(words in text for words in _MEMORY_WORDINGS)


def one_line(err: BaseException) -> str:
    """Return an error's message, without secrets, as one line of at most 500 characters."""
    text = without_secrets(" ".join(str(err).split()) or type(err).__name__)
    return text if len(text) <= 500 else text[:497] + "..."
