"""A part that was changed, cut, moved or replaced is found by every way to read it."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import CarvedDataset, codecs, open_cache
from pipeline.cache.checksum import crc32c
from pipeline.cache.commit import Commit, claim_identity
from pipeline.cache.fetched_rows import FetchedRows, unpack_rows
from pipeline.cache.places import Places
from pipeline.cache.row_place import RowPlace
from pipeline.cache.snapshot import build_snapshot
from pipeline.cache.verify import find_damage
from pipeline.cache.writer import RowToWrite
from pipeline.carved_cache import CarvedCache
from pipeline.errors import CacheFormatError
from pipeline.storage import Store, open_store
from tests.cache.rows import IDENTITY, SETTINGS, commit_rows, features, make_row, make_writer

NUM_ROWS = 8
KEYS = [f"k{i}" for i in range(NUM_ROWS)]


def rows_of(codec: str, seeds: Sequence[int]) -> list[RowToWrite]:
    """Return rows of one length, so that any two can take each other's place."""
    packer = codecs.build(codec)
    made = []
    for key, seed in zip(KEYS, seeds, strict=True):
        row = make_row(key, seed=seed, num_tokens=20, text=f"text {seed}")
        packed = packer.pack(features(seed, num_tokens=20))
        made.append(RowToWrite(**{**fields(row), "packed": packed}))
    return made


def fields(row: RowToWrite) -> dict:
    return {name: getattr(row, name) for name in RowToWrite.__slots__}


class Cache:
    """One committed shard, and what its images were before anybody touched it."""

    def __init__(self, codec: str, name: str) -> None:
        self.store: Store = open_store(f"memory://tampering-{name}")
        settings = {**SETTINGS, "codec": {"name": codec, "options": {}}}
        claim_identity(self.store, {**IDENTITY, "settings": settings})
        self.codec = codec
        rows = rows_of(codec, range(NUM_ROWS))
        size = len(rows[0].packed.tokens)
        self.sizes = {"row_group_bytes": 2 * size, "part_bytes": 4 * size}
        self.commit: Commit = commit_rows(self.store, "s", rows, **self.sizes)
        build_snapshot(self.store)
        self.parts = [f.path for f in self.commit.files if f.kind == "part"]
        self.whole = {path: self.store.read(path) for path in self.parts}
        cache = self.open()
        self.images = {key: cache[key] for key in KEYS}
        self.places = {key: cache.reader.find(key) for key in KEYS}

    def open(self) -> CarvedCache:
        return open_cache(self.store.url)

    def put(self, path: str, content: bytes) -> None:
        self.store.put(path, content)

    def restore(self) -> None:
        for path, content in self.whole.items():
            self.store.put(path, content)


@pytest.fixture(scope="module", params=["int8", "mixed", "gear"])
def cache(request: pytest.FixtureRequest) -> Cache:
    return Cache(request.param, request.param)


@pytest.fixture(autouse=True)
def _restored(cache: Cache):
    cache.restore()


def read_by_key(cache: Cache, keep_tokens: int | None = None) -> None:
    opened = cache.open()
    if keep_tokens is not None:
        opened = opened.keeping(keep_tokens)
    for key in KEYS:
        image = opened[key]
        expected = cache.images[key]
        kept = expected.ranks.argsort()[:keep_tokens].sort().values
        assert torch.equal(image.features, expected.features[kept])
        assert torch.equal(image.positions, expected.positions[kept])


def read_prefixes(cache: Cache) -> None:
    read_by_key(cache, 19)


def read_columns(cache: Cache) -> None:
    opened = cache.open()
    for number, key in enumerate(KEYS):
        values = opened.columns(key, ["txt", "width", "num_tokens"])
        assert values == {"txt": f"text {number}", "width": 640, "num_tokens": 20}


def scan(cache: Cache) -> None:
    found = [row for batch in cache.open().scan() for row in batch.to_pylist()]
    assert [row["key"] for row in found] == KEYS
    assert [row["txt"] for row in found] == [f"text {i}" for i in range(NUM_ROWS)]
    for row in found:
        place = cache.places[row["key"]]
        content = cache.whole[place.path]
        stored = content[place.tokens_offset : place.tokens_offset + place.tokens_length]
        assert row["tokens"] == stored


def iterate(cache: Cache) -> None:
    dataset = CarvedDataset(cache.open())
    rows = list(dataset)
    assert [row.key for row in rows] == KEYS
    for image in dataset.collate(rows).images():
        assert torch.equal(image.features, cache.images[image.key].features)


def iterate_with_captions(cache: Cache) -> None:
    rows = list(CarvedDataset(cache.open(), columns=["txt"]))
    expected = [(key, f"text {number}") for number, key in enumerate(KEYS)]
    assert [(row.key, row.columns["txt"]) for row in rows] == expected


WAYS = [read_by_key, read_prefixes, scan, iterate, iterate_with_captions]


def found_by(cache: Cache, way: Callable[[Cache], None]) -> bool:
    try:
        way(cache)
    except CacheFormatError:
        return True
    return False


def verified(cache: Cache) -> list[str]:
    return list(find_damage(cache.open().reader))


@pytest.mark.parametrize("way", [*WAYS, read_columns])
def test_what_nobody_touched_is_read_as_it_was_written(cache: Cache, way) -> None:
    assert not found_by(cache, way)
    assert verified(cache) == []


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_a_changed_byte_of_tokens_aux_or_head_is_found_by_all(cache: Cache, data) -> None:
    cache.restore()
    place = cache.places[data.draw(st.sampled_from(KEYS))]
    start, length = data.draw(
        st.sampled_from(
            [(place.tokens_offset, place.tokens_length), (place.aux_offset, place.aux_length)]
        )
    )
    content = bytearray(cache.whole[place.path])
    content[start + data.draw(st.integers(0, length - 1))] ^= data.draw(st.integers(1, 255))
    cache.put(place.path, bytes(content))

    assert all(found_by(cache, way) for way in WAYS)
    assert any(repr(place.key) in line for line in verified(cache))


def stored(cache: Cache, place: RowPlace) -> tuple[bytes, bytes]:
    """Return tokens and aux of a row as they were written."""
    content = cache.whole[place.path]
    spans = [(place.tokens_offset, place.tokens_length), (place.aux_offset, place.aux_length)]
    tokens, aux = (content[start : start + length] for start, length in spans)
    return tokens, aux


def fetched(place: RowPlace, content: bytes) -> FetchedRows:
    places = Places.of([place])
    tokens, aux = content[: place.tokens_length], content[place.tokens_length :]
    return FetchedRows(
        places=places,
        buffer=np.frombuffer(bytearray(content), np.uint8),
        tokens_at=np.array([0]),
        tokens_length=places.column("tokens_length"),
        aux_at=places.column("tokens_length"),
        token_sums=np.array([crc32c(tokens)], np.uint32),
        aux_sums=np.array([crc32c(aux)], np.uint32),
    )


def test_every_single_byte_of_a_row_counts(cache: Cache) -> None:
    place = cache.places["k1"]
    tokens, aux = stored(cache, place)
    missed = []

    for number in range(len(tokens) + len(aux)):
        changed = bytearray(tokens + aux)
        changed[number] ^= 0x40
        try:
            unpack_rows(fetched(place, bytes(changed)), keep_tokens=None, url="here")
        except CacheFormatError:
            continue
        missed.append(number)

    assert missed == []


def test_rows_are_the_same_where_they_have_too_many_blocks_to_check_at_once(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = cache.places["k1"]
    rows = fetched(place, b"".join(stored(cache, place)))
    at_once = unpack_rows(rows, keep_tokens=None, url="here").stored(0)
    monkeypatch.setattr("pipeline.cache.fetched_rows._MOST_SUMS", 0)

    found = unpack_rows(rows, keep_tokens=None, url="here").stored(0)

    assert (found.tokens, found.codec_aux) == (at_once.tokens, at_once.codec_aux)
    assert found.positions.tolist() == at_once.positions.tolist()
    assert found.sizes.tolist() == at_once.sizes.tolist()


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_a_changed_byte_anywhere_in_a_part_never_gives_a_wrong_value(cache: Cache, data) -> None:
    cache.restore()
    path = data.draw(st.sampled_from(cache.parts))
    content = bytearray(cache.whole[path])
    # Half of the file is tokens; its footer, of the same size, holds what misleads a parser.
    place = data.draw(st.integers(0, len(content) - 1) | st.integers(1, 3000).map(lambda n: -n))
    content[place] ^= data.draw(st.integers(1, 255))
    cache.put(path, bytes(content))

    for way in [*WAYS, read_columns]:
        found_by(cache, way)  # or it was right, which it asserts itself
    assert verified(cache)


def test_two_rows_that_change_places_are_found(cache: Cache) -> None:
    one, other = cache.places["k0"], cache.places["k1"]
    assert (one.path, one.tokens_length) == (other.path, other.tokens_length)
    content = bytearray(cache.whole[one.path])
    for name in ("tokens", "aux"):
        spans = [
            slice(at := getattr(p, f"{name}_offset"), at + getattr(p, f"{name}_length"))
            for p in (one, other)
        ]
        content[spans[0]], content[spans[1]] = content[spans[1]], content[spans[0]]
    cache.put(one.path, bytes(content))

    assert all(found_by(cache, way) for way in WAYS)
    assert any("'k0'" in line for line in verified(cache))


def test_rows_that_change_places_with_all_checksums_made_anew_are_found(cache: Cache) -> None:
    writer = make_writer(cache.store, "s", **cache.sizes)
    with writer:
        for row in rows_of(cache.codec, [1, 0, *range(2, NUM_ROWS)]):
            writer.write(row)
        files = writer.finish([])
    forged = next(f for f in files if f.path.endswith("part-00000.parquet"))
    (path,) = [p for p in cache.parts if p.endswith("part-00000.parquet")]
    assert forged.size == len(cache.whole[path])

    cache.put(path, cache.store.read(forged.path))

    assert all(found_by(cache, way) for way in [*WAYS, read_columns])
    assert verified(cache)


def test_two_parts_that_change_places_are_found(cache: Cache) -> None:
    first, second = cache.parts
    cache.put(first, cache.whole[second])
    cache.put(second, cache.whole[first])

    assert all(found_by(cache, way) for way in [*WAYS, read_columns])
    assert len(verified(cache)) >= NUM_ROWS


@pytest.mark.parametrize("kept", [0, 3, 500, -9, -1])
def test_a_cut_part_is_found(cache: Cache, kept: int) -> None:
    path = cache.parts[0]
    cache.put(path, cache.whole[path][:kept])

    assert found_by(cache, scan)
    assert found_by(cache, iterate_with_captions)
    assert verified(cache)
    # Rows are read by their places; where only the footer is cut they are all there.
    assert found_by(cache, iterate) == (kept >= 0)


def test_a_part_that_is_cut_while_it_is_open_does_not_end_the_process(tmp_path) -> None:
    store = open_store(str(tmp_path))
    claim_identity(store, IDENTITY)
    commit = commit_rows(store, "s", [make_row(f"k{i}", num_tokens=60) for i in range(40)])
    opened = open_cache(str(tmp_path))
    assert opened.columns("k1", ["txt"]) == {"txt": None}
    path = tmp_path / next(f.path for f in commit.files if f.kind == "part")

    with path.open("r+b") as file:
        file.truncate(100)

    with pytest.raises(CacheFormatError, match="damaged"):
        opened.columns("k39", ["txt"])
