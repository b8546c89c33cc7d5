"""Loaders that keep samples in files of their own: LitData and WebDataset."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from benchmarks.loaders_base import SEED, SHUFFLE_BUFFER, Epoch, Loader, cut_row
from benchmarks.loaders_batch import BATCH_ROWS, LoadedBatch, join
from benchmarks.loaders_inputs import Corpus

if TYPE_CHECKING:
    from litdata import StreamingDataset


def _litdata_row(number: int, corpus: Corpus, *, is_keyed: bool) -> dict[str, Any]:
    row = corpus.row(number)
    leaves = {"codes": row.codes.tobytes(), "aux": row.aux}
    if is_keyed:
        leaves = {name: torch.frombuffer(leaf, dtype=torch.int8) for name, leaf in leaves.items()}
    return {"key": row.key, **leaves}


def _litdata_key(sample: Mapping[str, Any]) -> str:
    return str(sample["key"])


def _join_samples(samples: Sequence[Mapping[str, Any]]) -> LoadedBatch:
    return join(
        [s["key"] for s in samples], [s["codes"] for s in samples], [s["aux"] for s in samples]
    )


def _join_tensors(samples: Sequence[Mapping[str, Any]]) -> LoadedBatch:
    arrays = [{**s, "codes": s["codes"].numpy(), "aux": s["aux"].numpy()} for s in samples]
    return _join_samples(arrays)


class LitData(Loader):
    """Chunks, memory-mapped where they lie or downloaded whole."""

    name: ClassVar[str] = "litdata"
    modules: ClassVar[tuple[str, ...]] = ("litdata",)
    packages: ClassVar[tuple[str, ...]] = ("litdata", "obstore")
    how: ClassVar[str] = (
        '`optimize(chunk_bytes="64MB")`, `StreamingDataset(shuffle=...)` in a '
        "`StreamingDataLoader`; `batch_decode=0`, faster than its default, on the local disk; "
        "written twice, with `bytes` leaves to stream and with tensors and `key_fn` for access by "
        "key, since each is several times slower at the other, and `bytes` cannot be read by index "
        "from S3; by key a dict of its `KeyIndex`, then the dataset by index (`get_by_key` looks "
        "each key up in a Parquet file); from S3 with obstore and asynchronous prefetch, its "
        "defaults, made to take plain HTTP, and a new `cache_dir` each time"
    )
    copies_locally: ClassVar[bool] = True

    def write(self, folder: Path) -> None:
        """Run its `optimize` with one worker, which keeps the order."""
        import litdata

        for name, is_keyed in (("stream", False), ("keyed", True)):
            litdata.optimize(
                fn=partial(_litdata_row, corpus=self.corpus, is_keyed=is_keyed),
                inputs=list(range(self.corpus.num_rows)),
                output_dir=str(folder / name),
                chunk_bytes="64MB",
                num_workers=1,
                keep_data_ordered=True,
                key_fn=_litdata_key if is_keyed else None,
                verbose=False,
            )

    def _dataset(self, name: str, *, shuffle: bool) -> "StreamingDataset":
        import litdata
        from litdata.streaming import downloader

        remote = {}
        if self.place.is_remote:
            downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # it takes https alone
            remote = {"cache_dir": str(self.place.cache_dir)}
        return litdata.StreamingDataset(
            f"{self.place.url}/{name}",
            shuffle=shuffle,
            seed=SEED,
            # Rows one by one are the fastest; of downloaded chunks of `bytes` they cannot be read.
            batch_decode="auto" if self.place.is_remote else 0,
            **remote,
        )

    def batches(self, epoch: Epoch) -> Iterable[LoadedBatch]:
        """Use its own loader, which has its own state."""
        import litdata

        loader = litdata.StreamingDataLoader(
            self._dataset("stream", shuffle=epoch.shuffle),
            batch_size=BATCH_ROWS,
            num_workers=epoch.num_workers,
            collate_fn=_join_samples,
        )
        return self.resumed(loader, epoch)

    @cached_property
    def _keyed(self) -> tuple["StreamingDataset", dict[str, int]]:
        from litdata.utilities.keys_index import KeyIndex

        index = KeyIndex(f"{self.place.url}/keyed")
        numbers = dict(zip(index.keys(), index.indices(), strict=True))
        return self._dataset("keyed", shuffle=False), numbers

    def by_key(self, keys: Sequence[str]) -> LoadedBatch:
        """Look the rows' numbers up."""
        dataset, numbers = self._keyed
        return _join_tensors([dataset[numbers[key]] for key in keys])


class WebDataset(Loader):
    """Tar files read from front to back."""

    name: ClassVar[str] = "webdataset"
    modules: ClassVar[tuple[str, ...]] = ("webdataset",)
    packages: ClassVar[tuple[str, ...]] = ("webdataset",)
    how: ClassVar[str] = (
        "one `.bin` member a row, the cheapest for it; `WebDataset(shardshuffle=all)` and "
        "`shuffle(1000)`, `batched(64)`, `WebLoader`; from S3 by its `curl` opener with signed URLs"
    )
    lacks: ClassVar[dict[str, str]] = {
        "by_key": "tar files have no index",
        "resume": "it has no state",
    }

    def write(self, folder: Path) -> None:
        """Write a tar file for each shard."""
        import webdataset

        for shard, numbers in enumerate(self.corpus.shards()):
            with webdataset.TarWriter(str(folder / f"shard-{shard:05d}.tar")) as tar:
                for row in map(self.corpus.row, numbers):
                    tar.write({"__key__": row.key, "bin": row.codes.tobytes() + row.aux})

    def batches(self, epoch: Epoch) -> Iterable[LoadedBatch]:
        """Build the pipeline of its documentation."""
        import webdataset

        urls = [f"{self.place.url}/shard-{s:05d}.tar" for s in range(self.corpus.num_shards)]
        if self.place.is_remote:
            import s3fs

            store = s3fs.S3FileSystem()
            urls = [store.sign(url, expiration=3600) for url in urls]
        shards = len(urls) if epoch.shuffle else False
        rows = webdataset.WebDataset(urls, shardshuffle=shards, seed=SEED)
        if epoch.shuffle:
            rows = rows.shuffle(SHUFFLE_BUFFER)
        batches = rows.batched(BATCH_ROWS, collation_fn=_join_members)
        return webdataset.WebLoader(batches, batch_size=None, num_workers=epoch.num_workers)


def _join_members(samples: Sequence[Mapping[str, Any]]) -> LoadedBatch:
    rows = [cut_row(s["bin"]) for s in samples]
    return join([s["__key__"] for s in samples], [r[0] for r in rows], [r[1] for r in rows])
