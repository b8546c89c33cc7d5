"""Caches mixed by weight: shares, order, resume, and what cannot be mixed."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from pipeline import CarvedDataset, MixedDataset, open_cache
from pipeline.cache.commit import claim_identity
from pipeline.carved_cache import CarvedCache
from pipeline.dataset import cache_source
from pipeline.dataset.mixed_source import shares_of
from pipeline.dataset.order import EpochOrder
from pipeline.errors import ConfigError
from pipeline.storage import open_store
from tests.cache.rows import IDENTITY, commit_rows, make_row

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def make(folder: Path, name: str, num_rows: int) -> CarvedCache:
    store = open_store(str(folder / name))
    claim_identity(store, IDENTITY)
    rows = [make_row(f"{name}{i:03d}", seed=i, num_tokens=5 + i % 30) for i in range(num_rows)]
    commit_rows(store, "s", rows, row_group_bytes=8_000)
    return open_cache(store.url)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> list[CarvedCache]:
    folder = tmp_path_factory.mktemp("mixed")
    return [make(folder, "a", 60), make(folder, "b", 21)]


def mixed(caches: list[CarvedCache], **options) -> MixedDataset:
    parts = [CarvedDataset(cache, shuffle=True, seed=5) for cache in caches]
    return MixedDataset(parts, **{"weights": [3, 1], "batch_size": 8, **options})


def keys_of(dataset) -> list[str]:
    return [key for batch in dataset for key in batch.keys]


def test_every_cycle_has_each_cache_by_its_weight(caches) -> None:
    found = keys_of(mixed(caches, rows=80))

    assert len(found) == 80
    for start in range(0, 80, 4):
        assert Counter(key[0] for key in found[start : start + 4]) == {"a": 3, "b": 1}


def test_rows_of_a_mixture_are_those_of_their_caches(caches) -> None:
    for batch in mixed(caches):
        for image in batch.images():
            expected = caches[image.key[0] == "b"][image.key]
            assert torch.equal(image.features, expected.features)
            assert torch.equal(image.positions, expected.positions)


def test_a_cache_that_runs_out_begins_again_and_all_its_rows_come_equally_often(caches) -> None:
    dataset = mixed(caches, weights=[1, 1], rows=2 * 21 * 4)
    counts = Counter()

    for epoch in range(5):
        dataset.set_epoch(epoch)
        counts.update(keys_of(dataset))

    of_each = {name: [n for key, n in counts.items() if key[0] == name] for name in "ab"}
    assert {len(of_each["a"]), len(of_each["b"])} == {60, 21}
    assert set(of_each["b"]) == {20}
    assert set(of_each["a"]) == {7}


def test_later_epochs_of_a_mixture_make_each_order_of_a_cache_once(
    caches, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def counted(**options):
        made.append(options["epoch"])
        return EpochOrder(**options)

    monkeypatch.setattr(cache_source, "EpochOrder", counted)
    dataset = mixed(caches, weights=[1, 1], rows=2 * 21, batch_size=2)
    dataset.set_epoch(7)  # all of the small cache's own epoch 7; from 2 to 3 of the large one's

    assert len(keys_of(dataset)) == 2 * 21
    assert sorted(made) == [2, 7]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_and_workers_share_a_mixture(caches, world_size: int, num_workers: int) -> None:
    whole = keys_of(mixed(caches))
    shared = []
    for rank in range(world_size):
        dataset = mixed(caches, rank=rank, world_size=world_size, batch_size=5)
        shared += keys_of(DataLoader(dataset, batch_size=None, num_workers=num_workers))

    assert Counter(shared) == Counter(whole)


@settings(max_examples=15, deadline=None)
@given(taken=st.integers(0, 9), size=st.integers(1, 20))
def test_a_state_goes_on_to_the_row(caches, taken: int, size: int) -> None:
    dataset = mixed(caches)
    whole = keys_of(dataset)
    done = [batch for _, batch in zip(range(taken), mixed(caches), strict=False)]
    state = done[-1].state if done else mixed(caches).state_dict()

    later = mixed(caches, batch_size=size)
    later.load_state_dict(json.loads(json.dumps(state)))

    assert [key for batch in done for key in batch.keys] + keys_of(later) == whole


def test_a_state_of_another_mixture_is_refused(caches) -> None:
    state = mixed(caches).state_dict()

    with pytest.raises(ConfigError, match="shares"):
        mixed(caches, weights=[1, 1]).load_state_dict(state)


def test_epochs_differ_and_can_be_repeated(caches) -> None:
    dataset = mixed(caches)
    first = keys_of(dataset)
    dataset.set_epoch(1)
    second = keys_of(dataset)
    dataset.set_epoch(0)

    assert first != second
    assert keys_of(dataset) == first


def test_token_budgets_hold_over_a_mixture(caches) -> None:
    dataset = mixed(caches, batch_size=None, batch_tokens=100)

    batches = list(dataset)

    assert max(int(batch.num_tokens.sum()) for batch in batches) <= 100
    assert [key for batch in batches for key in batch.keys] == keys_of(mixed(caches))


@settings(max_examples=200, deadline=None)
@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=5))
def test_shares_come_near_to_weights(weights: list[float]) -> None:
    if min(weights) / sum(weights) < 0.005:
        return
    shares = shares_of(weights)

    assert shares.sum() <= 1024 + len(weights)
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share / shares.sum() - weight / sum(weights)) <= 0.002


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"weights": [1]}, "2 datasets and 1 weights"),
        ({"weights": [1, 0]}, "above 0"),
        ({"weights": [1, float("nan")]}, "above 0"),
        ({"weights": [1, 1e-9]}, "one row in 1024"),
        ({"rows": 0}, "rows=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_impossible_mixtures_are_refused(caches, options: dict, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        mixed(caches, **options)


def test_caches_that_do_not_fit_together_are_refused(caches, tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    codec = {"name": "bf16", "options": {}}
    claim_identity(store, {**IDENTITY, "settings": {**IDENTITY["settings"], "codec": codec}})
    commit_rows(store, "s", [make_row("x")])

    with pytest.raises(ValueError, match="datasets 0 and 1 cannot be in one batch"):
        mixed([caches[0], open_cache(str(tmp_path))])
    parts = [CarvedDataset(caches[0], columns=["txt"]), CarvedDataset(caches[1])]
    with pytest.raises(ValueError, match="columns"):
        MixedDataset(parts, weights=[1, 1])
