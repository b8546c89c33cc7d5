"""A batch is what the cache says of its keys, wherever it goes and however long it is kept."""

import itertools
import mmap
import multiprocessing
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pipeline import Batch, CarvedDataset, codecs, open_cache
from pipeline.cache.buffers import BufferPool
from pipeline.cache.commit import claim_identity
from pipeline.cache.row_place import RowPlace
from pipeline.cache.snapshot import build_snapshot
from pipeline.cache.writer import RowToWrite
from pipeline.carved_cache import CachedImage, CarvedCache
from pipeline.codecs import Codec
from pipeline.errors import CacheFormatError
from pipeline.storage import open_store
from pipeline.types import TileLayout
from tests.cache.rows import IDENTITY, SETTINGS, commit_rows, features, make_row
from tests.dataset.caches import key_of, keys_of, make_cache, make_rows, write_rows

COUNTS = {
    "ragged": [1, 15, 16, 17, 40, 3, 33, 20],
    "even": [20] * 8,
    "one": [7],
}
TILES = TileLayout(rows=1, columns=2, unpadded=(0, 4, 0, 8))


def row_of(codec: Codec, number: int, num_tokens: int) -> RowToWrite:
    """Return a row; every third is of a tiled image."""
    row = make_row(key_of(number), seed=number, num_tokens=num_tokens, text=f"text {number}")
    packed = codec.pack(features(number, num_tokens=num_tokens))
    return replace(row, packed=packed, tiles=TILES if number % 3 == 1 else None)


def cache_of(codec: str, url: str, counts: Sequence[int]) -> CarvedCache:
    store = open_store(url)
    settings = {**SETTINGS, "codec": {"name": codec, "options": {}}}
    claim_identity(store, {**IDENTITY, "settings": settings})
    rows = [row_of(codecs.build(codec), n, count) for n, count in enumerate(counts)]
    commit_rows(store, "a", rows, row_group_bytes=2_000, part_bytes=4_000)
    build_snapshot(store)
    return open_cache(url)


@pytest.fixture(scope="module", params=codecs.names())
def codec(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module", params=list(COUNTS))
def cache(request: pytest.FixtureRequest, codec: str) -> CarvedCache:
    return cache_of(codec, f"memory://batch-{codec}-{request.param}", COUNTS[request.param])


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> CarvedCache:
    return make_cache(str(tmp_path_factory.mktemp("batch")), 60)


def whole(cache: CarvedCache, **options: Any) -> Batch:
    """Return all rows, in the order of keys."""
    (batch,) = CarvedDataset(cache, batch_size=len(cache), **options)
    return batch


def images(cache: CarvedCache, keep: int | None) -> list[CachedImage]:
    kept = cache if keep is None else cache.keeping(keep)
    return [kept[key] for key in sorted(cache)]


def assert_same_image(one: CachedImage, other: CachedImage) -> None:
    assert (one.key, one.grid, one.width, one.height, one.tiles) == (
        *(other.key, other.grid, other.width, other.height, other.tiles),
    )
    assert torch.equal(one.positions, other.positions)
    assert torch.equal(one.sizes, other.sizes)
    assert torch.equal(one.ranks, other.ranks)
    torch.testing.assert_close(one.features, other.features, rtol=0, atol=1e-6)


KEEPS = [None, 1, 16, 21]


@pytest.mark.parametrize("keep", KEEPS)
def test_images_of_a_batch_are_those_of_the_cache(cache: CarvedCache, keep: int | None) -> None:
    found = whole(cache, keep_tokens=keep).images()

    assert len(found) == len(cache)
    for one, other in zip(found, images(cache, keep), strict=True):
        assert_same_image(one, other)


@pytest.mark.parametrize("keep", KEEPS)
def test_a_packed_batch_is_its_images_one_behind_the_other(cache: CarvedCache, keep) -> None:
    expected = images(cache, keep)
    lengths = [len(image.positions) for image in expected]

    packed = whole(cache, keep_tokens=keep).packed()

    assert packed.cu_seqlens.tolist() == [0, *itertools.accumulate(lengths)]
    assert packed.max_seqlen == max(lengths)
    assert torch.equal(packed.positions, torch.cat([image.positions for image in expected]))
    assert torch.equal(packed.sizes, torch.cat([image.sizes for image in expected]))
    torch.testing.assert_close(
        packed.features, torch.cat([i.features for i in expected]), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("keep", KEEPS)
def test_a_padded_batch_is_its_images_with_nothing_behind_them(cache: CarvedCache, keep) -> None:
    expected = images(cache, keep)
    lengths = [len(image.positions) for image in expected]

    padded = whole(cache, keep_tokens=keep).padded()

    assert padded.features.shape == (len(expected), max(lengths), cache.width)
    assert padded.mask.sum(dim=1).tolist() == lengths
    assert torch.equal(padded.mask.sort(dim=1, descending=True).values, padded.mask)
    for values in (padded.features, padded.positions, padded.sizes):
        assert not values[~padded.mask].any()
    assert torch.equal(padded.positions[padded.mask], torch.cat([i.positions for i in expected]))
    assert torch.equal(padded.sizes[padded.mask], torch.cat([i.sizes for i in expected]))
    torch.testing.assert_close(
        padded.features[padded.mask],
        torch.cat([image.features for image in expected]),
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.parametrize("keep", KEEPS)
def test_codes_and_numbers_of_a_batch_are_those_that_are_stored(cache: CarvedCache, keep) -> None:
    stored = [
        row for batch in cache.scan(["key", "tokens", "num_tokens"]) for row in batch.to_pylist()
    ]
    counts = [min(row["num_tokens"], keep or row["num_tokens"]) for row in stored]
    cut = [
        row["tokens"][: len(row["tokens"]) // row["num_tokens"] * count]
        for row, count in zip(stored, counts, strict=True)
    ]

    batch = whole(cache, keep_tokens=keep, columns=["txt", "width"])

    assert batch.keys == [row["key"] for row in stored] == [row.key for row in batch]
    assert batch.num_tokens.tolist() == counts == [row.num_tokens for row in batch]
    assert batch.codes.numpy().tobytes() == b"".join(cut)
    assert batch.codes.shape[0] == sum(counts)
    assert batch.columns == {
        "txt": [f"text {n}" for n in range(len(stored))],
        "width": [640] * len(stored),
    }
    assert [place.key for place in batch.places] == batch.keys
    assert [row.place for row in batch] == batch.places
    assert [row.columns["txt"] for row in batch] == batch.columns["txt"]


@pytest.mark.parametrize("keep", [None, 5])
def test_a_pickled_batch_and_its_rows_arrive_as_they_were(cache: CarvedCache, keep) -> None:
    batch = whole(cache, keep_tokens=keep, columns=["txt"])

    arrived = pickle.loads(pickle.dumps(batch))
    rows = pickle.loads(pickle.dumps(list(batch)))
    again = CarvedDataset(cache).collate(rows)

    for other in (arrived, again):
        assert other.keys == batch.keys
        assert other.columns == batch.columns
        assert torch.equal(other.codes, batch.codes)
        torch.testing.assert_close(
            other.packed().features, batch.packed().features, rtol=0, atol=1e-6
        )
    assert arrived.state == batch.state is not None
    assert again.state is None


def test_rows_of_several_batches_are_put_together_in_any_order(cache: CarvedCache) -> None:
    dataset = CarvedDataset(cache, columns=["txt"])
    rows = [*reversed(list(dataset)), *itertools.islice(dataset, 3)]

    batch = dataset.collate(rows)

    assert batch.keys == [row.key for row in rows]
    assert batch.columns["txt"] == [row.columns["txt"] for row in rows]
    for one, row in zip(batch.images(), rows, strict=True):
        assert_same_image(one, cache[row.key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_have_the_type_that_was_asked_for(local: CarvedCache, dtype) -> None:
    batch = whole(local)

    assert batch.packed(dtype=dtype).features.dtype == dtype
    assert batch.padded(dtype=dtype).features.dtype == dtype
    assert {image.features.dtype for image in batch.images(dtype=dtype)} == {dtype}


@pytest.mark.parametrize("options", [{}, {"keep_tokens": 5}, {"batch_size": None}])
@pytest.mark.parametrize("url", ["local", "memory"])
def test_batches_of_workers_lie_in_shared_memory_and_are_those_of_no_worker(
    local: CarvedCache, url: str, options: dict, tmp_path: Path
) -> None:
    cache = local if url == "local" else make_cache(f"memory://{tmp_path.name}", 60)
    dataset = CarvedDataset(
        cache, **{"batch_size": 7, "shuffle": True, "columns": ["txt"], **options}
    )
    by_row = {"batch_size": 7, "collate_fn": dataset.collate}
    loading = by_row if dataset.batch_size is None else {"batch_size": None}

    sent = list(DataLoader(dataset, num_workers=1, **loading))
    own = list(DataLoader(dataset, num_workers=0, **loading))

    assert [batch.keys for batch in sent] == [batch.keys for batch in own]
    assert [batch.columns for batch in sent] == [batch.columns for batch in own]
    assert [batch.state for batch in sent] == [batch.state for batch in own]
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(sent, own, strict=True))
    assert all(
        torch.equal(a.padded().features, b.padded().features)
        for a, b in zip(sent, own, strict=True)
    )


def large_cache(url: str) -> CarvedCache:
    """Return 40 rows of 300 KiB: batches of several share no huge page."""
    store = open_store(url)
    identity = {**IDENTITY, "settings": {**SETTINGS, "width": 4096}}
    claim_identity(store, identity)
    codec = codecs.build("int8")
    rows = [
        replace(
            make_row(key, seed=n, num_tokens=72),
            packed=codec.pack(features(n, num_tokens=72, width=4096)),
        )
        for n, key in enumerate(keys_of(40))
    ]
    commit_rows(store, "a", rows, row_group_bytes=2 << 20, part_bytes=8 << 20)
    build_snapshot(store)
    return open_cache(url)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> CarvedCache:
    return large_cache(str(tmp_path_factory.mktemp("large")))


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_whatever_is_kept_of_a_batch_stays_as_it_is_while_epochs_go_on(
    large: CarvedCache, num_workers: int
) -> None:
    dataset = CarvedDataset(large, batch_size=4, shuffle=True, prefetch_bytes=5 << 20)
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
    kept: list[tuple[Any, bytes]] = []

    for epoch in range(3):
        dataset.set_epoch(epoch)
        for number, batch in enumerate(loader):
            tokens = batch.rows.tokens
            kept_of_it = [
                batch,
                batch.codes[3:-2, ::2],
                tokens[1000:90_000],
                tokens.data[5:70],
                next(iter(batch)),
                pickle.loads(pickle.dumps(batch)),
            ][number % 6]
            kept.append((kept_of_it, content(kept_of_it)))
            del batch, tokens, kept_of_it

    assert len(kept) == 30
    assert all(content(value) == before for value, before in kept)


def content(kept: Any) -> bytes:
    """Return the bytes of a batch, a row, a tensor, an array or a view of memory."""
    if hasattr(kept, "codes"):
        return kept.codes.numpy().tobytes()
    if hasattr(kept, "batch"):
        return kept.batch.codes.numpy().tobytes()
    return np.asarray(kept).tobytes()


def test_what_dies_in_a_process_forked_meanwhile_is_in_use_here_still(large: CarvedCache) -> None:
    dataset = CarvedDataset(large, batch_size=4, prefetch_bytes=1)
    loader = iter(DataLoader(dataset, batch_size=None, num_workers=1, prefetch_factor=1))
    kept = [next(loader)]
    before = content(kept[0])
    forked = multiprocessing.get_context("fork").Process(target=kept.clear)

    forked.start()
    forked.join()
    later = list(loader)

    assert forked.exitcode == 0
    assert len(later) == 9
    assert content(kept[0]) == before


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return where the bytes of every new mapping are written down."""
    sizes: list[int] = []
    original = mmap.mmap

    def counting(number: int, length: int, **options: Any) -> mmap.mmap:
        sizes.append(length)
        return original(number, length, **options)

    monkeypatch.setattr("pipeline.cache.buffers.mmap.mmap", counting)
    return sizes


def test_epochs_use_the_memory_of_the_first_again(
    large: CarvedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = counted(monkeypatch)
    fresh = open_cache(large.reader.store.url)  # whose reader has no memory yet
    dataset = CarvedDataset(fresh, batch_size=4, shuffle=True, prefetch_bytes=5 << 20)

    for epoch in range(5):
        dataset.set_epoch(epoch)
        for batch in dataset:
            assert len(batch) == 4
            del batch

    # 5 MiB of rows are ahead or in use; each has its page, and one is on its way back.
    assert 0 < sum(sizes) <= 5 * (2 << 20)


def test_small_batches_take_no_more_memory_than_their_rows(
    local: CarvedCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = counted(monkeypatch)

    batches = list(CarvedDataset(local, batch_size=1))

    assert len(batches) == 60
    assert sizes == []


def test_a_pool_gives_no_memory_twice_and_gives_back_what_is_not_used() -> None:
    pool = BufferPool()
    size = 3 << 20
    first, second = pool.take(size), pool.take(size)
    first[:], second[:] = 1, 2
    part = torch.from_numpy(first[7:9])
    address = second.ctypes.data
    del first, second

    third, fourth = pool.take(size), pool.take(size)
    third[:], fourth[:] = 3, 4

    assert part.tolist() == [1, 1]
    assert third.ctypes.data == address
    assert len(third) == len(fourth) == size
    assert len(pickle.loads(pickle.dumps(pool)).take(5)) == 5


def test_a_pool_of_varying_sizes_does_not_keep_what_fits_no_more(monkeypatch) -> None:
    sizes = counted(monkeypatch)
    pool = BufferPool()

    for size in (64 << 20, 2 << 20, 2 << 20, 2 << 20):
        pool.take(size)

    assert sizes == [64 << 20, 2 << 20]
    assert [len(region) for region in pool._free] == []


class Spoiled:
    """A cache with some rows changed in their part."""

    def __init__(self, url: str, keys: Sequence[str]) -> None:
        write_rows(url, make_rows(60))
        self.store = open_store(url)
        self.url = url
        self.keys = list(keys)
        reader = open_cache(url).reader
        self.places: dict[str, RowPlace] = {key: reader.find(key) for key in keys_of(60)}
        for key in keys:
            self.flip(self.places[key].path, self.places[key].tokens_offset)

    def flip(self, path: str, offset: int) -> None:
        content = bytearray(self.store.read(path))
        content[offset] ^= 1
        self.store.put(path, bytes(content))

    def cut(self, path: str, length: int) -> list[str]:
        """Cut a part; return the keys of rows that reach beyond."""
        self.store.put(path, self.store.read(path)[:length])
        return [
            key
            for key, p in self.places.items()
            if p.path == path
            and max(p.tokens_offset + p.tokens_length, p.aux_offset + p.aux_length) > length
        ]

    def dataset(self, **options: Any) -> CarvedDataset:
        return CarvedDataset(open_cache(self.url), **options)


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return {"local": str(tmp_path), "memory": f"memory://{tmp_path.name}"}[request.param]


SPOILED = ["k0003", "k0004", "k0031", "k0059"]


@pytest.mark.parametrize("batch_size", [8, None])
def test_a_damaged_row_is_named_with_its_part_and_place(url: str, batch_size) -> None:
    spoiled = Spoiled(url, ["k0031"])
    place = spoiled.places["k0031"]

    with pytest.raises(CacheFormatError) as raised:
        list(spoiled.dataset(batch_size=batch_size))

    assert f"{place.path} key 'k0031' (byte {place.tokens_offset})" in str(raised.value)


@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"columns": ["txt"]}])
def test_damaged_rows_are_left_out_of_their_batches_and_named(url: str, options: dict) -> None:
    spoiled = Spoiled(url, SPOILED)

    batches = list(spoiled.dataset(batch_size=8, skip_damaged=True, **options))

    found = sorted(key for batch in batches for key in batch.keys)
    damaged = sorted((row for b in batches for row in b.damaged), key=lambda row: row.key)
    assert found == [key for key in keys_of(60) if key not in SPOILED]
    assert [row.key for row in damaged] == SPOILED
    assert [(row.path, row.offset) for row in damaged] == [
        (spoiled.places[key].path, spoiled.places[key].tokens_offset) for key in SPOILED
    ]
    assert all(row.key in row.message and "checksum" in row.message for row in damaged)
    assert [len(b) + len(b.damaged) for b in batches] == [8] * 7 + [4]
    assert [batch.state["taken"] for batch in batches] == [8, 16, 24, 32, 40, 48, 56, 60]


def test_what_is_left_of_a_batch_with_damaged_rows_is_right(url: str) -> None:
    whole_batches = list(Spoiled(f"{url}-whole", []).dataset(batch_size=60, columns=["txt"]))
    spoiled = Spoiled(url, SPOILED)

    (batch,) = spoiled.dataset(batch_size=60, skip_damaged=True, columns=["txt"])

    kept = [n for n, key in enumerate(whole_batches[0].keys) if key not in SPOILED]
    images_of_all = whole_batches[0].images()
    assert batch.columns["txt"] == [f"text {n}" for n in kept]
    for one, number in zip(batch.images(), kept, strict=True):
        assert_same_image(one, images_of_all[number])


def test_damaged_rows_are_left_out_where_rows_are_given_one_by_one(url: str) -> None:
    spoiled = Spoiled(url, SPOILED)

    dataset = spoiled.dataset(skip_damaged=True, columns=["txt"])
    rows = list(dataset)

    assert [row.key for row in rows] == [key for key in keys_of(60) if key not in SPOILED]
    assert [row.columns["txt"] for row in rows] == [f"text {int(row.key[1:])}" for row in rows]
    assert {damaged.key for row in rows for damaged in row.batch.damaged} == set(SPOILED)
    assert dataset.state_dict()["taken"] == 60


@pytest.mark.parametrize("batch_size", [8, None])
def test_damaged_rows_are_left_out_by_workers(url: str, batch_size: int | None) -> None:
    dataset = Spoiled(url, SPOILED).dataset(skip_damaged=True, batch_size=batch_size)
    by_row = {"batch_size": 8, "collate_fn": dataset.collate}
    loading = by_row if batch_size is None else {"batch_size": None}

    batches = list(DataLoader(dataset, num_workers=2, **loading))

    found = [key for batch in batches for key in batch.keys]
    assert sorted(found) == [key for key in keys_of(60) if key not in SPOILED]


def test_an_epoch_goes_on_behind_damaged_rows(url: str) -> None:
    options = {"batch_size": 4, "skip_damaged": True, "shuffle": True}
    dataset = Spoiled(url, SPOILED).dataset(**options)
    expected = [batch.keys for batch in dataset]
    taken = list(itertools.islice(dataset, 6))

    dataset.load_state_dict(taken[-1].state)

    assert [batch.keys for batch in dataset] == expected[6:]


def test_damage_behind_the_tokens_that_are_wanted_is_not_read(url: str) -> None:
    spoiled = Spoiled(url, [])
    place = next(p for p in spoiled.places.values() if p.num_tokens > 16)
    spoiled.flip(place.path, place.tokens_offset + place.tokens_length - 1)

    assert len(list(spoiled.dataset(keep_tokens=16))) == 60
    with pytest.raises(CacheFormatError, match=place.key):
        list(spoiled.dataset(keep_tokens=17))


@pytest.mark.parametrize("batch_size", [8, None])
def test_a_cut_part_loses_the_rows_behind_the_cut_and_no_others(url: str, batch_size) -> None:
    spoiled = Spoiled(url, [])
    path = spoiled.places["k0020"].path
    lost = spoiled.cut(path, spoiled.places["k0020"].tokens_offset + 1)

    given = list(spoiled.dataset(batch_size=batch_size, skip_damaged=True))
    rows = [row for item in given for row in (item if batch_size else [item])]

    assert len(lost) > 1
    assert [row.key for row in rows] == [key for key in keys_of(60) if key not in lost]
    with pytest.raises(CacheFormatError, match=rf"{path}.*key .*{lost[0]}"):
        list(spoiled.dataset(batch_size=batch_size))


@pytest.mark.parametrize("length", [0, 1])
def test_a_batch_whose_rows_are_all_damaged_is_empty_and_says_so(url: str, length: int) -> None:
    spoiled = Spoiled(url, [])
    lost = spoiled.cut(spoiled.places["k0000"].path, length)

    first, *_ = spoiled.dataset(batch_size=4, skip_damaged=True, columns=["txt"])

    assert len(first) == 0
    assert [row.key for row in first.damaged] == lost[:4]
    assert first.keys == first.images() == list(first) == []
    assert first.codes.numel() == first.num_tokens.numel() == 0
    assert first.columns == {"txt": []}
    assert pickle.loads(pickle.dumps(first)).damaged == first.damaged
    with pytest.raises(CacheFormatError, match=r"without rows .* 4 were damaged"):
        first.packed()


def test_columns_of_a_cut_part_are_lost_with_its_rows(url: str) -> None:
    spoiled = Spoiled(url, [])
    path = spoiled.places["k0020"].path
    last = max(place.tokens_offset for place in spoiled.places.values() if place.path == path)
    lost = spoiled.cut(path, last + 1)

    batches = list(spoiled.dataset(batch_size=8, skip_damaged=True, columns=["txt"]))

    of_part = [key for key, place in spoiled.places.items() if place.path == path]
    found = [key for batch in batches for key in batch.keys]
    assert set(lost) < set(of_part)
    assert found == [key for key in keys_of(60) if key not in of_part]
