"""What `loaders.py` asks of every loader, and what several of them share."""

import importlib
import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, IterableDataset

from benchmarks.loaders_batch import BATCH_ROWS, LoadedBatch
from benchmarks.loaders_inputs import WIDTH, Corpus

SEED = 0
SHUFFLE_BUFFER = 1000  # rows, of the loaders that shuffle a stream
_ROW_BYTES_PER_TOKEN = WIDTH + 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a loader's data lies, and where it may keep copies of it."""

    url: str  # a folder, or s3://...
    cache_dir: Path  # new for each measurement

    @property
    def is_remote(self) -> bool:
        """Whether it is an object store."""
        return "://" in self.url


@dataclass(frozen=True, kw_only=True, slots=True)
class Epoch:
    """How the rows are wanted."""

    shuffle: bool
    num_workers: int  # 0: all in this process
    is_resumable: bool = False  # take what makes `Loader.state` work, if that costs anything
    state: Any = None  # of `Loader.state`, to go on from


class Loader(ABC):
    """One way to store the rows and to read them back.

    Attributes:
        name: on the page.
        modules: imported before any clock starts.
        packages: whose versions the page gives.
        how: the options chosen, for the page.
        lacks: why something cannot be measured, by measure or store.
        copies_locally: keeps what it fetched on a local disk.
    """

    name: ClassVar[str]
    modules: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[tuple[str, ...]] = ()
    how: ClassVar[str]
    lacks: ClassVar[Mapping[str, str]] = {}
    copies_locally: ClassVar[bool] = False

    def __init__(self, corpus: Corpus, place: Place) -> None:
        self.corpus = corpus
        self.place = place
        self._source: Any = None  # what has the state

    @classmethod
    def load_library(cls) -> None:
        """Import what it needs."""
        for name in cls.modules:
            importlib.import_module(name)

    @classmethod
    def versions(cls) -> str:
        """Return name and version of its packages."""
        return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in cls.packages)

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Write the corpus into an empty folder."""

    @abstractmethod
    def batches(self, epoch: Epoch) -> Iterable[LoadedBatch]:
        """Open the data and give it in batches of `BATCH_ROWS`; the last ones may be smaller."""

    def by_key(self, keys: Sequence[str]) -> LoadedBatch:
        """Return rows by key, in this order; the first call opens the data."""
        raise NotImplementedError(f"{self.name}: {self.lacks['by_key']}")

    def state(self) -> dict[str, Any]:
        """Return the state of the iteration that `batches` started."""
        return dict(self._source.state_dict())

    def resumed(self, source: Iterable[LoadedBatch], epoch: Epoch) -> Iterable[LoadedBatch]:
        """Let a source of batches go on where `epoch` says, and keep it for `state`."""
        self._source = source
        if epoch.state is not None:
            self._source.load_state_dict(epoch.state)
        return source


class RowTable(Dataset[LoadedBatch]):
    """A map-style dataset of which a DataLoader takes whole batches of rows."""

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitems__(self, numbers: Sequence[int]) -> LoadedBatch:
        raise NotImplementedError


def as_is(batch: LoadedBatch) -> LoadedBatch:
    """Leave a batch that is one already; for `collate_fn`."""
    return batch


def torch_loader(
    dataset: Dataset[Any], epoch: Epoch, *, context: str | None = None
) -> DataLoader[Any]:
    """Return torch's loader over a `RowTable`, or over an `IterableDataset` of batches.

    Args:
        dataset: either of them.
        epoch: `is_resumable` takes torchdata's StatefulDataLoader.
        context: how to start workers; None for torch's own choice.
    """
    kind: Any = DataLoader
    if epoch.is_resumable:
        from torchdata.stateful_dataloader import StatefulDataLoader

        kind = StatefulDataLoader
    is_stream = isinstance(dataset, IterableDataset)
    return kind(
        dataset,
        batch_size=None if is_stream else BATCH_ROWS,
        shuffle=None if is_stream else epoch.shuffle,
        num_workers=epoch.num_workers,
        collate_fn=as_is,
        multiprocessing_context=context if epoch.num_workers else None,
        generator=torch.Generator().manual_seed(SEED),
    )


def cut_row(content: bytes | memoryview | NDArray[np.uint8]) -> tuple[memoryview, memoryview]:
    """Return codes and aux of a row whose codes are followed by its aux."""
    view = memoryview(content)
    count = len(view) // _ROW_BYTES_PER_TOKEN
    return view[: count * WIDTH], view[count * WIDTH :]
