"""What every dataset of rows does: share an epoch, load ahead, and say where it stands."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar
from weakref import WeakValueDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from pipeline.cache.row_fetch import Allocate
from pipeline.codecs import Codec
from pipeline.dataset import batch as batches
from pipeline.dataset import shares
from pipeline.dataset.batch import Batch, PackedRow
from pipeline.dataset.loaded_rows import LoadedRows
from pipeline.dataset.resume import Resume
from pipeline.dataset.shared_memory import SharedSlots, forget_gone
from pipeline.dataset.shares import Ends, Reader, Share
from pipeline.dataset.stream import Source, Stream
from pipeline.errors import ConfigError

_STATE_VERSION = 1
P = TypeVar("P")


class EpochSource(Source[P], Protocol[P]):
    """Rows in the order of epochs, as `RowDataset` takes them."""

    @property
    def codec(self) -> Codec:
        """That all rows are packed with."""

    def identity(self) -> dict[str, Any]:
        """Return what tells this order of rows from any other, as JSON."""

    def length(self, epoch: int) -> int:
        """Return how many rows an epoch has."""

    def num_tokens(self, places: P) -> NDArray[np.int64]:
        """Return how many tokens each row gives."""


class RowDataset(IterableDataset[Any]):
    """Gives the batches, or rows, of one rank and worker; `CarvedDataset` says how.

    Args:
        source: of the rows.
        batch_size: rows of a batch; None to give rows.
        batch_tokens: instead, tokens of a batch.
        ends: what becomes of the rows behind the last full step.
        rank: of this process; None to ask `torch.distributed`.
        world_size: number of processes; None likewise.
        prefetch_bytes: of rows that are loaded ahead or in use.
        threads: that load them.
    """

    def __init__(  # noqa: PLR0913  (passed through by the datasets)
        self,
        source: EpochSource[Any],
        *,
        batch_size: int | None,
        batch_tokens: int | None,
        ends: Ends,
        rank: int | None,
        world_size: int | None,
        prefetch_bytes: int,
        threads: int,
    ) -> None:
        super().__init__()
        if batch_size is not None and batch_tokens is not None:
            raise ValueError("give batch_size or batch_tokens, not both")
        limits = {
            "batch_size": batch_size,
            "batch_tokens": batch_tokens,
            "prefetch_bytes": prefetch_bytes,
            "threads": threads,
        }
        for name, value in limits.items():
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be at least 1")
        if ends not in ("exact", "pad", "drop"):
            raise ValueError(f"ends={ends!r}: must be exact, pad or drop")
        self.source = source
        self.batch_size = batch_size
        self.batch_tokens = batch_tokens
        self.ends = ends
        self._rank, self._world_size = rank, world_size
        _check_place(self.rank, self.world_size)
        self.prefetch_bytes = prefetch_bytes
        self.threads = threads
        self._epoch, self._owner = _shared_number(0), os.getpid()
        self._resume: Resume | None = None
        self._at = _At()
        self._slots: SharedSlots | None = None
        _DATASETS[id(self)] = self

    def __getstate__(self) -> dict[str, Any]:
        """Travel to another process: from a process group, as a part of this rank."""
        forget_gone()
        self._own_epoch()
        own = {**self.__dict__, "_slots": None}
        if _is_distributed():
            own |= {"_rank": self.rank, "_world_size": self.world_size}
        return own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]
        _DATASETS[id(self)] = self

    @property
    def epoch(self) -> int:
        """Whose order the next iteration has."""
        return int(self._epoch)

    @property
    def rank(self) -> int:
        """Of this process."""
        if self._rank is not None:
            return self._rank
        return torch.distributed.get_rank() if _is_distributed() else 0

    @property
    def world_size(self) -> int:
        """Number of processes that share an epoch."""
        if self._world_size is not None:
            return self._world_size
        return torch.distributed.get_world_size() if _is_distributed() else 1

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next iteration; call it before each epoch.

        Of an epoch that a state was loaded of, the next iteration still begins where that says.

        Raises:
            ValueError: it is below 0.
        """
        if epoch < 0:
            raise ValueError(f"epoch={epoch}: must be at least 0")
        if epoch != self.epoch:
            self._resume, self._at = None, _At()
        self._share_epoch(epoch)

    def _share_epoch(self, epoch: int) -> None:
        """Tell the workers of this process, those too that stay from epoch to epoch."""
        self._own_epoch()
        self._epoch[0] = epoch

    def _own_epoch(self) -> None:
        """Have a number of this process and of the workers that it will start."""
        if get_worker_info() is None and self._owner != os.getpid():
            # Other ranks may hold the same memory, of a dataset that was made before them.
            self._epoch, self._owner = _shared_number(self.epoch), os.getpid()

    def collate(self, rows: Sequence[PackedRow]) -> Batch:
        """Put rows together; give it to a DataLoader as `collate_fn`."""
        return batches.collate(rows)

    def state_dict(self) -> dict[str, Any]:
        """Return where this iteration stands, in a few numbers.

        In a process of its own it fits any number of ranks and workers. In a DataLoader's worker it
        is the worker's own (torchdata's StatefulDataLoader asks for it, and gives it back to as
        many); there `batch.state` is what fits any number.
        """
        at, worker = self._at, get_worker_info()
        if worker is None:
            return self._state(self.epoch, at.end)
        return {**self._state(self.epoch, at.start), "steps": at.given, "worker": self._own_share()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a state was taken; the next iteration begins there.

        Raises:
            ConfigError: it is of another order: another seed, snapshot, filter or the like.
        """
        found, own = dict(state.get("order", {})), self.source.identity()
        if state.get("version") != _STATE_VERSION or found != own:
            differing = sorted(k for k in {*found, *own} if found.get(k) != own.get(k))
            raise ConfigError(
                f"this state is of another order of rows: {', '.join(differing) or 'version'} "
                f"differ ({ {k: found.get(k) for k in differing} }, here "
                f"{ {k: own.get(k) for k in differing} }); make the dataset as it was made then, "
                "of a cache opened at the same snapshot_number"
            )
        share = state.get("worker")
        if share is not None and share != self._own_share():
            raise ConfigError(
                f"this state is the own one of worker {share}, and here is {self._own_share()}; "
                "take it back to the same, or load the state of a batch, which fits all"
            )
        taken, steps = int(state["taken"]), int(state.get("steps", 0))
        self._share_epoch(int(state["epoch"]))
        self._resume = Resume.at(taken, steps)
        self._at = _At(start=taken, given=steps, end=taken)

    def __len__(self) -> int:
        """Return how many batches, or rows, the next iteration gives this rank.

        Raises:
            TypeError: with `batch_tokens`, because only reading tells.
        """
        if self.batch_tokens is not None:
            raise TypeError("with batch_tokens, the number of batches is not known before the end")
        reader = Reader(rank=self.rank, world_size=self.world_size)
        length = self.source.length(self.epoch)
        is_resumed = self._resume is not None and self._resume.is_open(self.rank)
        start = self._resume.taken if self._resume is not None and is_resumed else 0
        if self.batch_size is None:
            return shares.num_rows(length, start, reader, size=1, ends=self.ends)
        return shares.num_batches(length, start, reader, size=self.batch_size, ends=self.ends)

    def __iter__(self) -> Iterator[Any]:
        """Return this reader's batches, or rows, from a loaded state or the epoch's start on."""
        worker = get_worker_info()
        start, skipped = (0, 0) if self._resume is None else self._resume.use(worker, self.rank)
        self._at = _At(start=start, given=skipped, end=start)
        reader = Reader(
            rank=self.rank,
            world_size=self.world_size,
            worker=worker.id if worker else 0,
            num_workers=worker.num_workers if worker else 1,
        )
        # Not later: a generator would begin when it is first asked, in whatever epoch it is then.
        return self._loaded(self.epoch, reader, self._at)

    def _loaded(self, epoch: int, reader: Reader, at: "_At") -> Iterator[Any]:
        stream = Stream(
            source=self.source,
            epoch=epoch,
            allocate=self._memory(),
            prefetch_bytes=self.prefetch_bytes,
            threads=self.threads,
        )
        state = self._state(epoch, at.start)
        skipped = at.given
        for share, loaded in stream.load(_after(self._shares(epoch, at.start, reader), skipped)):
            yield from self._give(share, loaded, state, at)

    def _memory(self) -> Allocate | None:
        """Return what gives a DataLoader's worker memory that its main process sees."""
        if get_worker_info() is None:
            return None
        if self._slots is None or not self._slots.is_own:
            self._slots = SharedSlots()
        return self._slots.take

    def _shares(self, epoch: int, start: int, reader: Reader) -> Iterator[Share]:
        length = self.source.length(epoch)
        if self.batch_tokens is not None:
            return shares.in_budgets(
                length,
                start,
                reader,
                budget=self.batch_tokens,
                ends=self.ends,
                num_tokens=lambda positions: self.source.num_tokens(
                    self.source.places(epoch, positions)
                ),
            )
        if self.batch_size is None:
            return shares.one_by_one(length, start, reader, ends=self.ends)
        return shares.in_batches(length, start, reader, size=self.batch_size, ends=self.ends)

    def _give(
        self, share: Share, loaded: LoadedRows, state: Mapping[str, Any], at: "_At"
    ) -> Iterator[Any]:
        gives_batches = self.batch_size is not None or self.batch_tokens is not None
        end = int(share.ends[-1])
        whole = Batch(
            codec=self.source.codec,
            rows=loaded.rows,
            columns=loaded.columns,
            state={**state, "taken": end} if gives_batches else None,
            damaged=loaded.damaged,
        )
        if gives_batches:
            at.step(end)
            yield whole
            return
        place = {asked: number for number, asked in enumerate(loaded.asked.tolist())}
        for asked in range(len(share.positions)):
            # Rows of a last, shorter step may be several for one step.
            at.step(int(share.ends[min(asked, len(share.ends) - 1)]))
            if asked in place:
                yield PackedRow(batch=whole, number=place[asked])

    def _state(self, epoch: int, taken: int) -> dict[str, Any]:
        return {
            "version": _STATE_VERSION,
            "epoch": epoch,
            "taken": taken,
            "order": self.source.identity(),
        }

    def _own_share(self) -> dict[str, Any]:
        """Return what tells the steps of this worker from those of any other reader."""
        worker = get_worker_info()
        return {
            "rank": self.rank,
            "world_size": self.world_size,
            "worker": worker.id if worker else None,
            "num_workers": worker.num_workers if worker else None,
            "batch_size": self.batch_size,
            "batch_tokens": self.batch_tokens,
            "ends": self.ends,
        }


_DATASETS: WeakValueDictionary[int, RowDataset] = WeakValueDictionary()


def _before_fork() -> None:
    """Prepare for workers that a DataLoader forks; `__getstate__` does for those it spawns."""
    forget_gone()
    for reference in _DATASETS.valuerefs():
        if (dataset := reference()) is not None:
            dataset._own_epoch()


os.register_at_fork(before=_before_fork)


@dataclass(kw_only=True, slots=True)
class _At:
    """Where an iteration of one reader stands."""

    start: int = 0  # rows of the epoch that had been taken when it began
    given: int = 0  # steps of this reader since
    end: int = 0  # rows that all readers have taken after them

    def step(self, end: int) -> None:
        self.given, self.end = self.given + 1, end


def _after(mine: Iterator[Share], steps: int) -> Iterator[Share]:
    """Leave out so many steps."""
    for share in mine:
        if steps >= len(share.positions if share.steps > 1 else share.ends):
            steps -= share.steps
        elif steps:
            yield replace(share, positions=share.positions[steps:], ends=share.ends[steps:])
            steps = 0
        else:
            yield share


def _shared_number(value: int) -> Tensor:
    return torch.tensor([value]).share_memory_()  # type: ignore[no-untyped-call]


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _check_place(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank={rank}: must be in [0, world_size={world_size})")
