"""An epoch goes on where a state was taken, whatever ranks, workers and batches there are now."""

import itertools
import json
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torch.utils.data._utils import worker
from torchdata.stateful_dataloader import StatefulDataLoader

from pipeline import Batch, CarvedDataset, open_cache
from pipeline.cache.commit import claim_identity
from pipeline.cache.snapshot import build_snapshot
from pipeline.carved_cache import CarvedCache
from pipeline.errors import ConfigError
from pipeline.storage import open_store
from tests.cache.rows import IDENTITY, commit_rows, make_row
from tests.dataset.caches import keys_of, make_cache, make_rows, watched, write_rows

pytestmark = [
    # torchdata 0.11 calls it, torch 2.13 wants nobody to.
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
    # More workers than the machine has cores.
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
]

NUM_ROWS = 121
ALL = keys_of(NUM_ROWS)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> CarvedCache:
    return make_cache(str(tmp_path_factory.mktemp("resume")), NUM_ROWS)


def shuffled(cache: CarvedCache, **options: Any) -> CarvedDataset:
    return CarvedDataset(cache, **{"shuffle": True, "seed": 4, "window": 16, **options})


def keys(batches: Iterator[Batch] | DataLoader) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def whole(cache: CarvedCache, epoch: int = 0) -> list[str]:
    dataset = shuffled(cache, batch_size=8)
    dataset.set_epoch(epoch)
    return keys(iter(dataset))


def steps_of(
    cache: CarvedCache, world_size: int, *, epoch: int = 0, **options: Any
) -> list[list[Batch]]:
    """Return the batches of each step, rank after rank."""
    ranks = [
        shuffled(cache, rank=rank, world_size=world_size, **options) for rank in range(world_size)
    ]
    for rank in ranks:
        rank.set_epoch(epoch)
    return [[b for b in step if b is not None] for step in itertools.zip_longest(*ranks)]


def resumed(cache: CarvedCache, state: Any, **options: Any) -> CarvedDataset:
    dataset = shuffled(cache, **options)
    dataset.load_state_dict(state)
    return dataset


def keys_by_rank(cache: CarvedCache, state: Any, world_size: int, **options: Any) -> list[str]:
    ranks = [
        resumed(cache, state, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]
    return [
        key
        for step in itertools.zip_longest(*ranks)
        for batch in step
        if batch is not None
        for key in batch.keys
    ]


batchings = st.one_of(
    st.builds(lambda size: {"batch_size": size}, st.integers(1, 9)),
    st.builds(lambda tokens: {"batch_tokens": tokens}, st.integers(24, 150)),
)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    one=batchings,
    other=batchings,
    world_sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    epoch=st.integers(0, 3),
    at=st.floats(0, 1, exclude_max=True),
)
def test_another_job_goes_on_after_any_step(cache, one, other, world_sizes, epoch, at) -> None:
    steps = steps_of(cache, world_sizes[0], epoch=epoch, **one)
    done = steps[: 1 + int(at * len(steps))]
    (state,) = {json.dumps(batch.state) for batch in done[-1]}

    rest = keys_by_rank(cache, json.loads(state), world_sizes[1], **other)

    assert [key for step in done for key in keys(step)] + rest == whole(cache, epoch)


@settings(max_examples=20, deadline=None)
@given(num_taken=st.integers(0, NUM_ROWS), world_size=st.integers(1, 4), batching=batchings)
def test_rows_given_one_by_one_go_on_after_any_row(cache, num_taken, world_size, batching) -> None:
    dataset = shuffled(cache)
    taken = [row.key for row in itertools.islice(dataset, num_taken)]

    rest = keys_by_rank(cache, dataset.state_dict(), world_size, **batching)

    assert taken + rest == whole(cache)


def test_a_state_of_lanes_is_good_for_another_job_with_the_same_lanes(cache: CarvedCache) -> None:
    options = {"batch_size": 4, "lanes": 3}
    expected = keys(iter(shuffled(cache, **options)))
    done = steps_of(cache, 3, **options)[:4]

    rest = keys_by_rank(cache, done[-1][0].state, 2, **options)

    assert [key for step in done for key in keys(step)] + rest == expected


def test_a_state_that_was_resumed_from_is_the_state_until_a_batch_is_taken(cache) -> None:
    state = list(shuffled(cache, batch_size=8))[3].state
    dataset = resumed(cache, state, batch_size=8)
    assert dataset.state_dict() == state

    batches = iter(dataset)
    assert dataset.state_dict() == state

    assert next(batches).state == dataset.state_dict() != state


def test_a_resumed_dataset_says_how_many_batches_are_left(cache: CarvedCache) -> None:
    state = list(shuffled(cache, batch_size=8))[3].state

    assert len(shuffled(cache, batch_size=8)) == 16
    assert len(resumed(cache, state, batch_size=8)) == 12
    assert len(resumed(cache, state)) == NUM_ROWS - 32


def test_the_number_of_batches_is_that_of_the_next_iteration(cache: CarvedCache) -> None:
    dataset = resumed(cache, list(shuffled(cache, batch_size=8))[3].state, batch_size=8)

    assert len(list(dataset)) == 12
    assert len(dataset) == len(list(dataset)) == 16


@pytest.mark.parametrize("sets_epoch", [True, False])
def test_the_epoch_after_a_resumed_one_is_whole(cache: CarvedCache, sets_epoch: bool) -> None:
    dataset = resumed(cache, list(shuffled(cache, batch_size=8))[3].state, batch_size=8)
    assert keys(iter(dataset)) == whole(cache)[32:]

    dataset.set_epoch(int(sets_epoch))

    assert keys(iter(dataset)) == whole(cache, int(sets_epoch))


def test_the_loop_that_sets_every_epoch_goes_on_in_the_one_of_the_state(cache) -> None:
    before = shuffled(cache, batch_size=8)
    before.set_epoch(1)
    dataset = resumed(cache, list(before)[3].state, batch_size=8)
    found = []

    for epoch in range(1, 4):
        dataset.set_epoch(epoch)
        found.append(keys(iter(dataset)))

    assert found == [whole(cache, 1)[32:], whole(cache, 2), whole(cache, 3)]


def test_a_state_of_the_end_leaves_nothing_and_then_the_next_epoch(cache: CarvedCache) -> None:
    dataset = resumed(cache, list(shuffled(cache, batch_size=8))[-1].state, batch_size=8)

    assert list(dataset) == []
    assert keys(iter(dataset)) == whole(cache)


def test_the_state_between_two_epochs_is_the_start_of_the_second(cache: CarvedCache) -> None:
    dataset = shuffled(cache, batch_size=8)
    list(dataset)
    dataset.set_epoch(1)

    assert keys(iter(resumed(cache, dataset.state_dict(), batch_size=8))) == whole(cache, 1)


def test_an_iteration_that_has_begun_stands_at_its_start_before_its_first_batch(cache) -> None:
    dataset = shuffled(cache, batch_size=8)
    list(dataset)

    second = iter(dataset)

    assert dataset.state_dict()["taken"] == 0
    assert keys(second) == whole(cache)


def test_batches_keep_the_epoch_they_are_of_when_the_next_is_set_meanwhile(cache) -> None:
    dataset = shuffled(cache, batch_size=8)
    batches = iter(dataset)
    next(batches)

    dataset.set_epoch(1)
    late = next(batches)

    assert late.state is not None and late.state["epoch"] == 0
    assert keys(iter(resumed(cache, late.state, batch_size=8))) == whole(cache)[16:]
    assert dataset.state_dict()["epoch"] == 1
    assert dataset.state_dict()["taken"] == 0


def test_an_iteration_left_early_is_followed_by_a_whole_one(cache: CarvedCache) -> None:
    dataset = resumed(cache, list(shuffled(cache, batch_size=8))[3].state, batch_size=8)

    first = next(iter(dataset))

    assert first.keys == whole(cache)[32:40]
    assert keys(iter(dataset)) == whole(cache)


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
def test_a_batch_of_a_loader_says_where_all_its_workers_stand(cache, num_workers: int) -> None:
    loader = DataLoader(shuffled(cache, batch_size=8), batch_size=None, num_workers=num_workers)
    taken = list(itertools.islice(loader, 5))
    state = json.loads(json.dumps(taken[-1].state))

    dataset = resumed(cache, state, batch_size=5)
    other = DataLoader(dataset, batch_size=None, num_workers=(num_workers + 2) % 4)

    assert keys(taken) + keys(other) == whole(cache)


@pytest.mark.parametrize("sets_epoch", [True, False])
@pytest.mark.parametrize("is_persistent", [True, False])
def test_the_epoch_after_a_resumed_one_of_workers_is_whole(
    cache: CarvedCache, sets_epoch: bool, is_persistent: bool
) -> None:
    state = list(shuffled(cache, batch_size=8))[3].state
    dataset = resumed(cache, state, batch_size=8)
    loader = DataLoader(dataset, batch_size=None, num_workers=2, persistent_workers=is_persistent)
    assert len(loader) == 12
    assert keys(loader) == whole(cache)[32:]

    dataset.set_epoch(int(sets_epoch))

    assert len(loader) == 16
    assert keys(loader) == whole(cache, int(sets_epoch))


def test_another_process_sets_the_epoch_of_its_own_dataset(cache: CarvedCache) -> None:
    dataset = shuffled(cache, batch_size=8)
    other = multiprocessing.get_context("fork").Process(target=dataset.set_epoch, args=(3,))

    other.start()
    other.join()

    assert other.exitcode == 0
    assert dataset.epoch == 0
    assert keys(iter(dataset)) == whole(cache)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_another_process_are_told_its_second_epoch(cache: CarvedCache, start) -> None:
    """As of a rank that was started with its dataset, and sets no epoch before the first."""
    context = multiprocessing.get_context(start)
    found = context.Queue()
    dataset = shuffled(cache, batch_size=8)
    rank = context.Process(target=give_two_epochs, args=(dataset, start, found))
    rank.start()
    epochs = found.get(timeout=100)
    rank.join()

    assert epochs == [whole(cache, 0), whole(cache, 1)]


def give_two_epochs(dataset: CarvedDataset, start: str, found) -> None:
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context=start,
    )
    first = keys(loader)
    dataset.set_epoch(1)
    found.put([first, keys(loader)])


def begin_late(number: int) -> None:
    time.sleep(0.7 * number)


def test_workers_that_had_not_begun_when_a_resumed_epoch_was_left_do_not_resume_the_next(
    cache: CarvedCache,
) -> None:
    state = list(shuffled(cache, batch_size=8))[3].state
    loader = DataLoader(
        resumed(cache, state, batch_size=8),
        batch_size=None,
        num_workers=2,
        worker_init_fn=begin_late,
    )

    first = next(iter(loader))

    assert first.keys == whole(cache)[32:40]
    assert keys(loader) == whole(cache)


def stateful(cache: CarvedCache, *, by_rows: bool, **options: Any) -> StatefulDataLoader:
    if by_rows:
        dataset = shuffled(cache)
        return StatefulDataLoader(dataset, batch_size=8, collate_fn=dataset.collate, **options)
    return StatefulDataLoader(shuffled(cache, batch_size=8), batch_size=None, **options)


@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize(
    "options",
    [{"num_workers": 0}, {"num_workers": 2}, {"num_workers": 2, "snapshot_every_n_steps": 3}],
)
@pytest.mark.parametrize(
    "num_taken", [0, 5, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 14))]
)
def test_a_stateful_loader_goes_on_after_any_batch(
    cache: CarvedCache, by_rows: bool, options: dict, num_taken: int
) -> None:
    expected = [batch.keys for batch in stateful(cache, by_rows=by_rows, **options)]
    loader = stateful(cache, by_rows=by_rows, **options)
    taken = [batch.keys for batch in itertools.islice(loader, num_taken)]
    state = json.loads(json.dumps(loader.state_dict()))

    other = stateful(cache, by_rows=by_rows, **options)
    other.load_state_dict(state)
    rest = [batch.keys for batch in other]
    after = [batch.keys for batch in other]

    assert taken + rest == expected
    assert after == expected
    assert sorted(itertools.chain(*expected)) == ALL


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("is_persistent", [False, True])
@pytest.mark.parametrize("num_taken", [0, 1, 4])
def test_a_stateful_loader_goes_on_in_its_second_epoch(
    cache: CarvedCache, num_workers: int, is_persistent: bool, num_taken: int
) -> None:
    options = {
        "by_rows": False,
        "num_workers": num_workers,
        "persistent_workers": is_persistent and num_workers > 0,
    }
    loader = stateful(cache, **options)
    list(loader)
    loader.dataset.set_epoch(1)
    second = iter(loader)
    taken = [batch.keys for batch in itertools.islice(second, num_taken)]
    state = loader.state_dict()

    other = stateful(cache, **options)
    other.load_state_dict(state)
    other.dataset.set_epoch(1)
    rest = [batch.keys for batch in other]

    assert list(itertools.chain(*taken, *rest)) == whole(cache, 1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_end_of_a_stateful_loaders_epoch_is_the_start_of_the_next(
    cache: CarvedCache, num_workers: int
) -> None:
    loader = stateful(cache, by_rows=False, num_workers=num_workers)
    list(loader)
    state = loader.state_dict()

    other = stateful(cache, by_rows=False, num_workers=num_workers)
    other.load_state_dict(state)

    assert keys(other) == whole(cache)
    assert keys(other) == whole(cache)


def test_the_state_of_a_stateful_loader_of_batches_is_not_needed_to_change_the_workers(
    cache: CarvedCache,
) -> None:
    loader = stateful(cache, by_rows=False, num_workers=2)
    taken = list(itertools.islice(loader, 3))
    other = StatefulDataLoader(
        resumed(cache, taken[-1].state, batch_size=8), batch_size=None, num_workers=3
    )
    more = list(itertools.islice(other, 4))
    again = StatefulDataLoader(shuffled(cache, batch_size=8), batch_size=None, num_workers=3)
    again.load_state_dict(other.state_dict())

    assert keys(taken) + keys(more) + keys(again) == whole(cache)
    assert keys(other) == whole(cache)


@pytest.fixture
def be_worker(monkeypatch: pytest.MonkeyPatch):
    """Return what makes this process seem one of two workers of a DataLoader."""

    def be(number: int) -> None:
        info = worker.WorkerInfo(id=number, num_workers=2, seed=7 + number, dataset=None)
        monkeypatch.setattr(worker, "_worker_info", info)

    return be


@pytest.mark.parametrize(
    "change", [{"world_size": 2}, {"rank": 1}, {"batch_size": 4}, {"batch_size": None}]
)
def test_the_state_of_a_worker_is_refused_by_another_share(cache, be_worker, change) -> None:
    options = {"batch_size": 8, "rank": 0, "world_size": 3}
    be_worker(0)
    state = shuffled(cache, **options).state_dict()

    shuffled(cache, **options).load_state_dict(state)
    with pytest.raises(ConfigError, match=f"own one of worker .*{next(iter(change))}"):
        shuffled(cache, **{**options, **change}).load_state_dict(state)


def test_the_state_of_a_worker_is_refused_by_another_and_by_a_process_without_any(
    cache: CarvedCache, be_worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_worker(0)
    state = shuffled(cache).state_dict()

    be_worker(1)
    with pytest.raises(ConfigError, match="own one of worker"):
        shuffled(cache).load_state_dict(state)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="own one of worker"):
        shuffled(cache).load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"seed": 5}, "seed"),
        ({"window": 17}, "shuffle"),
        ({"shuffle": False}, "shuffle"),
        ({"lanes": 2}, "shuffle"),
        ({"filters": [("num_tokens", ">", 3)]}, "filters"),
    ],
)
def test_a_state_of_another_order_is_refused_and_what_differs_is_named(
    cache: CarvedCache, options: dict, named: str
) -> None:
    state = next(iter(shuffled(cache, batch_size=8))).state
    other = shuffled(cache, batch_size=8, **options)

    with pytest.raises(ConfigError, match=rf"of another order of rows: .*\b{named}\b.* differ"):
        other.load_state_dict(state)


def test_a_state_of_another_snapshot_is_refused_and_one_of_the_same_taken(tmp_path: Path) -> None:
    url = str(tmp_path)
    before = make_cache(url, 20)
    state = next(iter(shuffled(before, batch_size=8))).state
    write_rows(url, make_rows(20))  # other attempts at the same shards are not taken
    commit_rows(open_store(url), "c", [make_row("more")])
    build_snapshot(open_store(url))

    with pytest.raises(ConfigError, match="rows, snapshot differ"):
        shuffled(open_cache(url), batch_size=8).load_state_dict(state)

    same = open_cache(url, snapshot_number=before.reader.snapshot.number)
    assert (
        keys(iter(resumed(same, state, batch_size=8)))
        == keys(iter(shuffled(before, batch_size=8)))[8:]
    )


def test_a_state_of_another_version_is_refused(cache: CarvedCache) -> None:
    dataset = shuffled(cache, batch_size=8)

    with pytest.raises(ConfigError, match="version"):
        dataset.load_state_dict({**dataset.state_dict(), "version": 2})


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([("key", "in", ["k0001", "k0002"])], [("key", "in", ("k0001", "k0002"))]),
        ([("key", "in", {"a", "b", "c", "d"})], [("key", "in", ["d", "c", "b", "a"])]),
        ([("num_tokens", ">", 3)], [[("num_tokens", ">", 3)]]),
    ],
)
def test_one_filter_is_one_order_however_it_is_written(cache: CarvedCache, one, other) -> None:
    state = shuffled(cache, batch_size=8, filters=one).state_dict()

    shuffled(cache, batch_size=8, filters=other).load_state_dict(state)


def test_filters_by_many_keys_differ_where_one_key_does(cache: CarvedCache) -> None:
    keys_wanted = np.array([f"k{n:06d}" for n in range(3000)])
    others = keys_wanted.copy()
    others[1500] = "k9"
    state = shuffled(cache, batch_size=8, filters=[("key", "in", keys_wanted)]).state_dict()

    with pytest.raises(ConfigError, match="filters"):
        shuffled(cache, batch_size=8, filters=[("key", "in", others)]).load_state_dict(state)


@pytest.mark.parametrize("num_rows", [10, 10_000])
def test_a_state_is_small_however_large_the_cache(tmp_path: Path, num_rows: int) -> None:
    url = f"memory://{tmp_path.name}"
    row = make_row("x", num_tokens=1)
    store = open_store(url)
    claim_identity(store, IDENTITY)
    fields = {name: getattr(row, name) for name in type(row).__slots__}
    rows = [type(row)(**{**fields, "key": key}) for key in keys_of(num_rows)]
    commit_rows(store, "a", rows, row_group_bytes=num_rows)
    dataset = shuffled(open_cache(url), batch_size=num_rows // 2, filters=[("key", ">", "k0")])

    batch = next(iter(dataset))

    assert len(json.dumps(batch.state)) < 1000
    assert len(json.dumps(dataset.state_dict())) < 1000


@pytest.mark.parametrize(
    ("kind", "options"),
    [("local", {}), ("local", {"shuffle": False}), ("memory", {"shuffle": False})],
)
def test_what_was_taken_is_not_read_again(tmp_path: Path, kind: str, options: dict) -> None:
    # Rows of more bytes than are read for nothing between two that are wanted.
    large = {"local": 100, "memory": 100}[kind]
    url = {"local": str(tmp_path), "memory": f"memory://{tmp_path.name}"}[kind]
    rows = [make_row(key, seed=n, num_tokens=large) for n, key in enumerate(keys_of(60))]
    write_rows(url, rows, row_group_bytes=30_000, part_bytes=60_000)
    first = shuffled(open_cache(url), batch_size=7, **options)
    taken = list(itertools.islice(first, 5))
    cache, store = watched(url)

    rest = list(resumed(cache, taken[-1].state, batch_size=3, **options))

    assert not any(store.has_read(place) for batch in taken for place in batch.places)
    assert all(store.has_read(place) for batch in rest for place in batch.places)


def test_a_resumed_epoch_is_the_same_tensors(cache: CarvedCache) -> None:
    batches = list(shuffled(cache, batch_size=8))
    rest = list(resumed(cache, batches[3].state, batch_size=8))

    pairs = list(zip(batches[4:], rest, strict=True))

    assert all(torch.equal(one.codes, other.codes) for one, other in pairs)
    assert all(torch.equal(a.packed().features, b.packed().features) for a, b in pairs)
