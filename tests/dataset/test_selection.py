"""Filters give the rows that anybody would pick by hand, and read no token to find them."""

import itertools
import operator
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from pipeline import CarvedDataset, open_cache
from pipeline.cache.commit import claim_identity
from pipeline.cache.snapshot import build_snapshot
from pipeline.carved_cache import CarvedCache
from pipeline.errors import KeyNotFoundError
from pipeline.storage import open_store
from tests.cache.rows import IDENTITY, commit_rows, make_row
from tests.dataset.caches import distant, key_of, keys_of, make_cache, write_rows

NUM_ROWS = 90
TAIL = 64 << 10  # bytes of a part that are read for its footer
Row = dict[str, Any]


def write_colourful(url: str) -> None:
    """Write 90 keys, ten of them twice, with widths of their own; some captions are null."""
    store = open_store(url)
    claim_identity(store, IDENTITY)
    rows = [
        replace(
            make_row(
                key_of(n),
                seed=n,
                num_tokens=1 + n * 7 % 24,
                text=None if n % 6 == 5 else f"text {n % 7}",
            ),
            image_size=(100 + 10 * (n % 13), 480 + n % 2),
        )
        for n in range(NUM_ROWS)
    ]
    again = [make_row(key_of(n), seed=1000 + n, num_tokens=30, text="again") for n in range(40, 50)]
    commit_rows(store, "a", rows[:60], row_group_bytes=2_000, part_bytes=8_000)
    commit_rows(store, "b", [*again, *rows[60:]], row_group_bytes=2_000, part_bytes=8_000)
    build_snapshot(store)


@pytest.fixture(scope="module", params=["local", "memory"])
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CarvedCache:
    folder = tmp_path_factory.mktemp("selection")
    url = {"local": str(folder), "memory": f"memory://{folder.name}"}[request.param]
    write_colourful(url)
    return open_cache(url)


NAMES = ["key", "num_tokens", "width", "height", "txt"]


@pytest.fixture(scope="module")
def rows(cache: CarvedCache) -> list[Row]:
    """The rows by the cache's own word, one by one."""
    return [cache.columns(key, NAMES) for key in cache]


OPERATORS = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "<=": operator.le,
    ">=": operator.ge,
}


def holds(row: Row, condition: tuple[str, str, Any]) -> bool:
    name, op, value = condition
    if op == "in":
        return row[name] in value
    if op == "not in":
        return row[name] not in value
    return row[name] is not None and OPERATORS[op](row[name], value)


def picked(
    rows: Sequence[Row], alternatives: Sequence[Sequence[tuple[str, str, Any]]]
) -> list[str]:
    return [
        row["key"]
        for row in rows
        if any(all(holds(row, condition) for condition in some) for some in alternatives)
    ]


def keys_of_filter(cache: CarvedCache, filters: Any, **options: Any) -> list[str]:
    return sorted(row.key for row in CarvedDataset(cache, filters=filters, **options))


VALUES = {
    "key": st.integers(0, NUM_ROWS + 5).map(key_of),
    "num_tokens": st.integers(0, 31),
    "width": st.integers(90, 660),
    "height": st.integers(479, 482),
    "txt": st.sampled_from([*(f"text {n}" for n in range(8)), "again", ""]),
}


@st.composite
def conditions(draw, names: Sequence[str]) -> tuple[str, str, Any]:
    name = draw(st.sampled_from(names))
    if draw(st.booleans()):
        values = st.lists(VALUES[name], min_size=1, max_size=6)
        container = draw(st.sampled_from([list, tuple, set]))
        return name, draw(st.sampled_from(["in", "not in"])), container(draw(values))
    return name, draw(st.sampled_from(list(OPERATORS))), draw(VALUES[name])


def alternatives(names: Sequence[str]) -> st.SearchStrategy:
    return st.lists(st.lists(conditions(names), min_size=1, max_size=3), min_size=1, max_size=3)


@pytest.mark.parametrize("names", [NAMES, pytest.param(NAMES[:4], marks=pytest.mark.slow)])
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_filter_gives_what_is_picked_row_by_row(cache, rows, names, data) -> None:
    filters = data.draw(alternatives(names))

    assert keys_of_filter(cache, filters) == picked(rows, filters)


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_one_list_of_conditions_is_all_of_them(cache, rows, data) -> None:
    conditions_of_all = data.draw(st.lists(conditions(NAMES), min_size=1, max_size=3))

    assert keys_of_filter(cache, conditions_of_all) == picked(rows, [conditions_of_all])


def test_rows_that_pass_come_in_the_order_of_storage(cache, rows) -> None:
    found = [row.key for row in CarvedDataset(cache, filters=[("num_tokens", ">", 5)])]

    every = [row.key for row in CarvedDataset(cache)]
    passing = {row["key"] for row in rows if row["num_tokens"] > 5}
    assert found == [key for key in every if key in passing]


@pytest.mark.parametrize("world_size", [1, 3])
def test_filtered_rows_are_shuffled_and_shared(cache, rows, world_size: int) -> None:
    filters = [("txt", "in", ["text 1", "text 3"])]
    options = {"shuffle": True, "window": 8, "batch_size": 4, "world_size": world_size}

    ranks = [CarvedDataset(cache, filters=filters, rank=r, **options) for r in range(world_size)]

    expected = picked(rows, [filters])
    assert sum(len(rank) for rank in ranks) == sum(len(list(rank)) for rank in ranks)
    found = [key for rank in ranks for batch in rank for key in batch.keys]
    assert sorted(found) == expected
    assert found != expected


def test_filtered_rows_have_their_own_columns_and_tokens(cache: CarvedCache) -> None:
    dataset = CarvedDataset(
        cache,
        filters=[("txt", "=", "text 2")],
        columns=["txt", "width"],
        batch_size=5,
        shuffle=True,
    )

    for batch in dataset:
        assert batch.columns["txt"] == ["text 2"] * len(batch)
        assert batch.columns["width"] == [image.width for image in batch.images()]
        assert [i.features.tolist() for i in batch.images()] == [
            cache[key].features.tolist() for key in batch.keys
        ]


def test_a_row_hidden_by_an_equal_key_does_not_pass_for_it(cache: CarvedCache) -> None:
    twice = keys_of(NUM_ROWS)[40:50]
    shown = [cache.columns(key, ["txt"])["txt"] for key in twice]
    filters = [("key", "in", twice), ("txt", "=", "again")]

    found = keys_of_filter(cache, filters)

    assert found == [key for key, text in zip(twice, shown, strict=True) if text == "again"]
    assert keys_of_filter(cache, [("key", "in", twice)]) == twice


def test_a_filter_that_nothing_passes_is_an_empty_epoch(cache: CarvedCache) -> None:
    for ends in ("exact", "pad", "drop"):
        dataset = CarvedDataset(
            cache, filters=[("num_tokens", ">", 99)], batch_size=4, shuffle=True, ends=ends
        )
        assert len(dataset) == len(list(dataset)) == 0


def test_workers_have_the_selection_of_their_dataset(cache: CarvedCache) -> None:
    filters = [("txt", "in", {"text 1", "text 3", "text 5"}), ("num_tokens", "<", 20)]
    dataset = CarvedDataset(cache, filters=filters, batch_size=4, columns=["txt"])

    found = [k for b in DataLoader(dataset, batch_size=None, num_workers=2) for k in b.keys]

    assert found == [key for batch in dataset for key in batch.keys]


@pytest.mark.parametrize(
    "filters", [[], [[]], [()], [[("num_tokens", ">", 3)], []], [("num_tokens", ">")]]
)
def test_a_filter_without_a_whole_condition_is_refused(cache: CarvedCache, filters) -> None:
    with pytest.raises(ValueError, match=r"filters="):
        CarvedDataset(cache, filters=filters)


@pytest.mark.parametrize("op", ["like", "=>", "is", ""])
def test_an_operator_that_is_none_is_refused(cache: CarvedCache, op: str) -> None:
    with pytest.raises(ValueError, match="not a valid operator"):
        CarvedDataset(cache, filters=[("num_tokens", op, 3)])


@pytest.mark.parametrize("name", ["caption", "tokens_", "row_number"])
def test_a_filter_by_a_column_that_is_none_is_refused_and_those_there_are_named(
    cache: CarvedCache, name: str
) -> None:
    with pytest.raises(ValueError, match=f"no column '{name}'; there are .*txt"):
        CarvedDataset(cache, filters=[(name, "=", "x")])


@pytest.mark.parametrize(("name", "value"), [("num_tokens", "many"), ("txt", 3), ("key", 5)])
def test_a_value_of_another_type_than_its_column_is_refused(cache, name, value) -> None:
    with pytest.raises(ValueError, match="a filter does not fit its column"):
        CarvedDataset(cache, filters=[(name, "<", value)])


@pytest.mark.parametrize("options", [{}, {"batch_size": 4}])
def test_a_column_that_is_none_is_refused_at_once(cache: CarvedCache, options: dict) -> None:
    with pytest.raises(ValueError, match=r"no column 'caption'; there are .*txt"):
        CarvedDataset(cache, columns=["txt", "caption"], **options)


def test_columns_come_with_every_row_in_any_order(cache: CarvedCache, rows) -> None:
    by_key = {row["key"]: row for row in rows}

    batches = list(CarvedDataset(cache, columns=NAMES, batch_size=7, shuffle=True))

    for batch in batches:
        assert batch.columns["key"] == batch.keys
        for name in NAMES:
            assert batch.columns[name] == [by_key[key][name] for key in batch.keys]
    assert sum(map(len, batches)) == NUM_ROWS


def table_of(keys: Sequence[str]) -> pa.Table:
    return pa.table(
        {
            "label": [f"label of {key}" for key in keys],
            "key": list(keys),
            "score": [[int(key[1:]), 0.5] for key in keys],
        }
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_table_is_joined_by_key_in_any_order(cache: CarvedCache, num_workers: int) -> None:
    table = table_of(list(reversed(keys_of(NUM_ROWS + 3))))
    dataset = CarvedDataset(cache, join=table, columns=["txt"], batch_size=8, shuffle=True)

    batches = list(DataLoader(dataset, batch_size=None, num_workers=num_workers))

    assert [batch.columns["label"] for batch in batches] == [
        [f"label of {key}" for key in batch.keys] for batch in batches
    ]
    assert [batch.columns["score"] for batch in batches] == [
        [[int(key[1:]), 0.5] for key in batch.keys] for batch in batches
    ]
    assert set(batches[0].columns) == {"txt", "label", "score"}


def test_a_row_that_the_table_does_not_have_is_an_error_that_names_it(cache: CarvedCache) -> None:
    table = table_of([key for key in keys_of(NUM_ROWS) if key != "k0007"])

    with pytest.raises(KeyNotFoundError, match="no row for image 'k0007'"):
        list(CarvedDataset(cache, join=table, batch_size=8))


def test_a_row_that_the_table_does_not_have_is_null_if_that_is_wanted(cache: CarvedCache) -> None:
    table = table_of([key for key in keys_of(NUM_ROWS) if key != "k0007"])

    rows = list(CarvedDataset(cache, join=table, join_missing="null"))

    missing = [row.key for row in rows if row.columns["label"] is None]
    assert missing == ["k0007"] == [row.key for row in rows if row.columns["score"] is None]


def test_filters_by_key_and_joins_go_together(cache: CarvedCache) -> None:
    wanted = keys_of(NUM_ROWS)[10:20]

    rows = list(CarvedDataset(cache, filters=[("key", "in", wanted)], join=table_of(wanted)))

    assert [row.columns["label"] for row in rows] == [f"label of {row.key}" for row in rows]
    assert sorted(row.key for row in rows) == wanted


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (pa.table({"name": ["a"], "label": ["b"]}), "expected 'key' and others"),
        (pa.table({"key": ["a"]}), "expected 'key' and others"),
        (pa.table({"key": ["a", "a"], "label": [1, 2]}), "of 2 keys of the table 1 differ"),
        (pa.table({"key": ["a", None], "label": [1, 2]}), "some are null"),
        (pa.table({"key": [1, 2], "label": [1, 2]}), "text"),
    ],
)
def test_a_table_that_cannot_be_joined_is_refused(cache: CarvedCache, table, problem) -> None:
    with pytest.raises(ValueError, match=problem):
        CarvedDataset(cache, join=table)


def test_a_column_cannot_be_both_of_the_cache_and_of_the_table(cache: CarvedCache) -> None:
    table = pa.table({"key": keys_of(NUM_ROWS), "txt": ["x"] * NUM_ROWS})

    with pytest.raises(ValueError, match="txt"):
        CarvedDataset(cache, columns=["txt"], join=table)


@pytest.mark.parametrize("filters", [[("num_tokens", "=", 100)], [("txt", "=", "text 3")]])
def test_filters_read_no_tokens_and_an_epoch_those_that_passed(tmp_path: Path, filters) -> None:
    url = str(tmp_path)
    made = [
        make_row(key, seed=n, num_tokens=100 - n % 5, text=f"text {n % 5}")
        for n, key in enumerate(keys_of(60))
    ]
    # Row groups larger than what is read for nothing between two places.
    write_rows(url, made, row_group_bytes=300_000, part_bytes=300_000)
    cache, store = distant(url)

    dataset = CarvedDataset(cache, filters=filters)
    length = len(dataset)
    places = [cache.reader.find(key) for key in keys_of(60)]
    before = [p for p in places if store.has_read(p)]
    rows = list(dataset)

    assert length == len(rows) == 12
    assert all(p.tokens_offset + p.tokens_length > store.size(p.path) - TAIL for p in before)
    assert all(store.has_read(row.place) for row in rows)


def test_filters_by_what_the_index_knows_open_no_part(tmp_path: Path) -> None:
    make_cache(str(tmp_path), 60)
    cache, store = distant(str(tmp_path))

    CarvedDataset(cache, filters=[("num_tokens", ">", 9), ("key", ">", "k0005")])

    assert not any("part-" in path for path, _, _ in store.spans)


def test_a_cache_without_a_snapshot_is_filtered_too(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    claim_identity(store, IDENTITY)
    commit_rows(store, "a", [make_row(k, seed=n, text=k) for n, k in enumerate(keys_of(9))])

    dataset = CarvedDataset(open_cache(str(tmp_path)), filters=[("txt", ">", "k0004")])

    assert [row.key for row in itertools.islice(dataset, 2)] == ["k0005", "k0006"]
    assert len(dataset) == 4
