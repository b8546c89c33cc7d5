"""The torch dataset: every row once, in a seeded order, as packed or padded batches."""

import gc
import itertools
import pickle
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from pipeline import Batch, CarvedDataset, open_cache
from pipeline.cache.commit import claim_identity
from pipeline.cache.snapshot import build_snapshot
from pipeline.carved_cache import CarvedCache
from pipeline.errors import KeyNotFoundError
from pipeline.storage import open_store
from tests.cache.rows import CODEC, IDENTITY, commit_rows, features, make_row

NUM_ROWS = 37


@pytest.fixture(scope="module", params=["local", "memory"])
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CarvedCache:
    name = tmp_path_factory.mktemp("dataset")
    url = {"local": str(name), "memory": f"memory://{name.name}"}[request.param]
    store = open_store(url)
    claim_identity(store, IDENTITY)
    rows = [
        make_row(f"k{i:02d}", seed=i, num_tokens=10 + i, text=f"text {i}") for i in range(NUM_ROWS)
    ]
    commit_rows(store, "a", rows[:20], row_group_bytes=12_000, part_bytes=20_000)
    commit_rows(store, "b", rows[20:], row_group_bytes=12_000)
    build_snapshot(store)
    return open_cache(url)


def keys(dataset: CarvedDataset) -> list[str]:
    return [row.key for row in dataset]


def test_without_shuffle_rows_come_once_in_the_order_of_storage(cache: CarvedCache) -> None:
    assert keys(CarvedDataset(cache)) == [f"k{i:02d}" for i in range(NUM_ROWS)]


def test_the_shuffle_depends_on_seed_and_epoch_alone(cache: CarvedCache) -> None:
    dataset = CarvedDataset(cache, shuffle=True, seed=1)
    first = keys(dataset)
    again = keys(CarvedDataset(cache, shuffle=True, seed=1))
    dataset.set_epoch(1)

    assert sorted(first) == [f"k{i:02d}" for i in range(NUM_ROWS)]
    assert first == again
    assert first != sorted(first)
    assert keys(dataset) != first
    assert keys(CarvedDataset(cache, shuffle=True, seed=2)) != first


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 50])
def test_ranks_share_the_rows_and_the_order(cache: CarvedCache, world_size: int) -> None:
    whole = keys(CarvedDataset(cache, shuffle=True, seed=3))

    parts = [
        keys(CarvedDataset(cache, shuffle=True, seed=3, rank=r, world_size=world_size))
        for r in range(world_size)
    ]

    shared = itertools.chain.from_iterable(itertools.zip_longest(*parts))
    assert [key for key in shared if key is not None] == whole
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("num_workers", [1, 2])
def test_loader_workers_share_the_rows(tmp_path: Path, num_workers: int) -> None:
    store = open_store(str(tmp_path))
    claim_identity(store, IDENTITY)
    commit_rows(store, "a", [make_row(f"k{i:02d}", seed=i) for i in range(11)])
    dataset = CarvedDataset(open_cache(str(tmp_path)), shuffle=True)

    loader = DataLoader(dataset, batch_size=2, num_workers=num_workers, collate_fn=dataset.collate)
    found = [key for batch in loader for key in batch.keys]

    assert sorted(found) == [f"k{i:02d}" for i in range(11)]


@pytest.mark.parametrize(
    "options",
    [
        {"prefetch_bytes": 1},
        {"prefetch_bytes": 5000, "threads": 1},
        {"threads": 7},
        {"keep_tokens": 3},
        {"columns": ["txt", "width"]},
        {"skip_damaged": True},
        {"batch_tokens": 100, "batch_size": None},
    ],
)
def test_how_rows_are_read_changes_nothing_about_their_order(
    cache: CarvedCache, options: dict[str, Any]
) -> None:
    shape = {"shuffle": True, "seed": 3, "window": 8, "batch_size": 5}
    expected = [key for batch in CarvedDataset(cache, **shape) for key in batch.keys]

    found = [key for batch in CarvedDataset(cache, **{**shape, **options}) for key in batch.keys]

    assert found == expected


@pytest.mark.parametrize("lanes", [2, 3, 50])
def test_with_lanes_every_row_comes_once(cache: CarvedCache, lanes: int) -> None:
    dataset = CarvedDataset(cache, shuffle=True, window=8, lanes=lanes, batch_size=3)

    found = [key for batch in dataset for key in batch.keys]

    assert sorted(found) == [f"k{i:02d}" for i in range(NUM_ROWS)]


def test_readers_that_take_turns_read_row_groups_of_their_own_with_a_lane_each(
    tmp_path: Path,
) -> None:
    store = open_store(str(tmp_path))
    claim_identity(store, IDENTITY)
    rows = [make_row(f"k{i:03d}", seed=i, num_tokens=10) for i in range(240)]
    commit_rows(store, "a", rows, row_group_bytes=10 * 640)
    build_snapshot(store)
    options = {"shuffle": True, "window": 16, "lanes": 4, "batch_size": 4, "world_size": 4}

    ranks = [CarvedDataset(open_cache(str(tmp_path)), rank=r, **options) for r in range(4)]

    groups = [{place.row_group for batch in rank for place in batch.places} for rank in ranks]
    assert [len(mine) for mine in groups] == [6] * 4
    assert len(set().union(*groups)) == 24


def test_two_iterations_at_once_are_both_whole(cache: CarvedCache) -> None:
    dataset = CarvedDataset(cache, shuffle=True, batch_size=5)
    expected = [batch.keys for batch in dataset]

    pairs = [(one.keys, other.keys) for one, other in zip(dataset, dataset, strict=True)]

    assert pairs == [(keys_of_batch, keys_of_batch) for keys_of_batch in expected]


def test_an_iteration_left_early_leaves_no_thread_behind(cache: CarvedCache) -> None:
    for batch in CarvedDataset(cache, batch_size=2, prefetch_bytes=5000):
        assert len(batch) == 2
        break
    gc.collect()

    assert [t.name for t in threading.enumerate() if t.name.startswith("carve")] == []


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("ends", ["exact", "pad", "drop"])
def test_a_loader_knows_its_number_of_batches(cache: CarvedCache, num_workers, ends) -> None:
    dataset = CarvedDataset(cache, batch_size=5, ends=ends)
    loader = DataLoader(dataset, batch_size=None, num_workers=num_workers)

    assert len(loader) == len(list(loader))
    assert len(CarvedDataset(cache, ends=ends)) == NUM_ROWS


def test_the_number_of_batches_of_a_budget_is_not_known(cache: CarvedCache) -> None:
    dataset = CarvedDataset(cache, batch_tokens=100)

    with pytest.raises(TypeError, match="not known before the end"):
        len(dataset)
    assert all(int(batch.num_tokens.sum()) <= 100 for batch in list(dataset))


def test_a_budget_smaller_than_a_row_is_refused_when_it_comes(cache: CarvedCache) -> None:
    with pytest.raises(ValueError, match="batch_tokens=20: a row has 21 tokens"):
        list(CarvedDataset(cache, batch_tokens=20))

    kept = list(CarvedDataset(cache, batch_tokens=20, keep_tokens=20))
    assert [key for batch in kept for key in batch.keys] == keys(CarvedDataset(cache))


def test_an_epoch_below_zero_is_refused(cache: CarvedCache) -> None:
    with pytest.raises(ValueError, match="epoch=-1"):
        CarvedDataset(cache).set_epoch(-1)


def test_a_padded_batch_holds_every_token_at_its_place(cache: CarvedCache) -> None:
    dataset = CarvedDataset(cache)
    rows = [row for row in dataset if row.key in ("k03", "k20")]

    batch = dataset.collate(rows)
    padded = batch.padded()

    assert batch.keys == ["k03", "k20"]
    assert padded.features.shape == (2, 30, 64)
    assert padded.mask.sum(dim=1).tolist() == [13, 30]
    assert torch.equal(padded.features[0, :13], cache["k03"].features)
    assert torch.equal(padded.positions[0, :13], cache["k03"].positions)
    assert torch.equal(padded.sizes[1], cache["k20"].sizes)
    assert not padded.features[0, 13:].any()


def test_a_packed_batch_is_the_images_one_after_another(cache: CarvedCache) -> None:
    dataset = CarvedDataset(cache)
    batch = dataset.collate([row for row in dataset if row.key in ("k03", "k20")])

    packed = batch.packed(dtype=torch.bfloat16)

    assert packed.cu_seqlens.tolist() == [0, 13, 43]
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.features.dtype == torch.bfloat16
    assert torch.equal(packed.features[13:], cache["k20"].features.to(torch.bfloat16))
    assert torch.equal(packed.positions[:13], cache["k03"].positions)


def test_tokens_come_back_within_the_codecs_error(cache: CarvedCache) -> None:
    image = cache["k05"]
    row = make_row("k05", seed=5, num_tokens=15)
    by_position = np.argsort(row.positions)

    expected = features(5, num_tokens=15)[torch.from_numpy(by_position)]

    assert image.positions.tolist() == sorted(row.positions.tolist())
    bound = CODEC.max_error * expected.abs().amax(dim=1, keepdim=True)
    assert bool(((image.features - expected).abs() <= bound).all())


@pytest.mark.parametrize("keep", [1, 5, 16, 17, 1000, sys.maxsize, 10**30])
def test_a_prefix_is_the_best_ranked_tokens_in_position_order(
    cache: CarvedCache, keep: int
) -> None:
    dataset = CarvedDataset(cache, keep_tokens=keep)
    rows = {row.key: row for row in dataset}

    (image,) = dataset.collate([rows["k30"]]).images()

    whole = cache["k30"]
    best = torch.sort(torch.argsort(whole.ranks)[: min(keep, 1000)]).values
    assert torch.equal(image.features, whole.features[best])
    assert torch.equal(image.positions, whole.positions[best])
    assert torch.equal(image.ranks, whole.ranks[best])


def test_asked_columns_come_with_the_rows(cache: CarvedCache) -> None:
    dataset = CarvedDataset(cache, columns=["txt"])

    batch = dataset.collate(list(dataset)[:2])

    assert batch.columns == {"txt": ["text 0", "text 1"]}


def test_rows_hidden_by_an_equal_key_are_not_given(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    claim_identity(store, IDENTITY)
    commit_rows(store, "a", [make_row("x", seed=1), make_row("y", seed=2)])
    commit_rows(store, "b", [make_row("x", seed=3), make_row("z", seed=4)])

    assert sorted(keys(CarvedDataset(open_cache(str(tmp_path))))) == ["x", "y", "z"]


def test_an_empty_cache_gives_nothing(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    claim_identity(store, IDENTITY)
    commit_rows(store, "a", [])

    assert keys(CarvedDataset(open_cache(str(tmp_path)), shuffle=True)) == []


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"keep_tokens": 0}, "keep_tokens=0"),
        ({"rank": 2, "world_size": 2}, "rank=2"),
        ({"rank": -1, "world_size": 2}, "rank=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_tokens": 0}, "batch_tokens=0"),
        ({"batch_size": 2, "batch_tokens": 90}, "batch_size or batch_tokens, not both"),
        ({"ends": "even"}, "ends='even': must be exact, pad or drop"),
        ({"window": 0}, "window=0"),
        ({"lanes": 0}, "lanes=0"),
        ({"seed": -1}, "seed=-1"),
        ({"threads": 0}, "threads=0"),
        ({"prefetch_bytes": 0}, "prefetch_bytes=0"),
    ],
)
def test_impossible_options_are_refused(
    cache: CarvedCache, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        CarvedDataset(cache, **options)


@pytest.mark.parametrize("with_snapshot", [True, False])
def test_a_batch_carries_its_rows_alone_however_large_the_cache(
    tmp_path: Path, with_snapshot: bool
) -> None:
    sizes = []
    for num_rows in (3, 300):
        store = open_store(str(tmp_path / f"{num_rows:03d}"))
        claim_identity(store, IDENTITY)
        rows = [make_row(f"k{i:03d}", seed=i, num_tokens=2, text="t") for i in range(num_rows)]
        commit_rows(store, "a", rows)
        if with_snapshot:
            build_snapshot(store)
        dataset = CarvedDataset(open_cache(store.url), columns=["txt"])
        batch = dataset.collate(list(itertools.islice(dataset, 2)))
        sizes.append(len(pickle.dumps(batch)))

        arrived = pickle.loads(pickle.dumps(batch))

        assert arrived.keys == ["k000", "k001"]
        assert arrived.columns == {"txt": ["t", "t"]}
        assert torch.equal(arrived.padded().features, batch.padded().features)

    assert sizes[1] < sizes[0] + 16  # places further into a file take a few more bytes
    assert sizes[1] < 2000


def not_nested(folder: Path) -> str:
    store = open_store(str(folder))
    claim_identity(store, {**IDENTITY, "nested": False})
    commit_rows(store, "a", [make_row("x")])
    return store.url


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "is not nested" in r.getMessage()]


def test_fewer_tokens_of_a_carver_that_is_not_nested_are_called_an_approximation_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = open_cache(not_nested(tmp_path))
    CarvedDataset(cache)
    assert warnings_of(caplog) == []

    smaller = CarvedDataset(cache, keep_tokens=5)
    CarvedDataset(cache, keep_tokens=3)
    CarvedDataset(smaller.cache, keep_tokens=2)

    (message,) = warnings_of(caplog)
    assert "best 5 tokens are not what carving to 5 would give" in message


def test_a_cache_opened_with_fewer_tokens_says_so_and_its_dataset_does_not_repeat_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = not_nested(tmp_path)

    CarvedDataset(open_cache(url, keep_tokens=5), keep_tokens=4)
    assert len(warnings_of(caplog)) == 1

    open_cache(url, keep_tokens=5)
    assert len(warnings_of(caplog)) == 2


def test_fewer_tokens_of_a_nested_carver_need_no_warning(
    cache: CarvedCache, caplog: pytest.LogCaptureFixture
) -> None:
    CarvedDataset(cache, keep_tokens=5)

    assert warnings_of(caplog) == []


@pytest.mark.parametrize("num_rows", [0, 3])
def test_no_keys_are_no_rows(tmp_path: Path, num_rows: int) -> None:
    store = open_store(str(tmp_path))
    claim_identity(store, IDENTITY)
    commit_rows(store, "a", [make_row(f"k{i}", seed=i) for i in range(num_rows)])
    opened = open_cache(str(tmp_path))

    assert opened.get_many([]) == []
    batch = Batch.of_keys(opened, [], columns=["txt"])
    assert (batch.keys, len(batch), batch.columns) == ([], 0, {"txt": []})
    with pytest.raises(KeyNotFoundError, match="'k9'"):
        opened.get_many(["k9"])
