"""A reader keeps few parts open, whatever the number of parts and threads."""

import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest

from pipeline.cache.reader import SnapshotReader
from pipeline.cache.snapshot import build_snapshot
from pipeline.storage import Store, open_store
from tests.cache.rows import commit_rows, make_row

NUM_PARTS = 60


@pytest.fixture(scope="module", params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("reader")
    store = open_store({"local": str(folder), "memory": f"memory://{folder.name}"}[request.param])
    rows = [make_row(f"k{i:02d}", seed=i, num_tokens=2, text=f"t{i}") for i in range(NUM_PARTS)]
    commit_rows(store, "s", rows, row_group_bytes=1, part_bytes=1)
    build_snapshot(store)
    return store


@pytest.fixture
def reader(store: Store) -> SnapshotReader:
    reader = SnapshotReader(store=store, snapshot=build_snapshot(store))
    assert len(reader.files) == NUM_PARTS
    return reader


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_reading_every_part_keeps_few_of_them_open(reader: SnapshotReader) -> None:
    before = num_open_files()

    for _ in range(2):
        assert sum(batch.num_rows for batch in reader.scan(["key"])) == NUM_PARTS
        for i, key in enumerate(reader.keys()):
            assert reader.read_columns(reader.find(key), ["txt"]) == {"txt": f"t{i}"}

    assert num_open_files() - before <= 16


def test_threads_read_parts_while_others_are_closed(reader: SnapshotReader) -> None:
    before = num_open_files()
    places = [reader.find(key) for key in reader.keys()]  # noqa: SIM118  (a reader is no dict)

    def read(number: int) -> str:
        place = places[number % NUM_PARTS]
        return reader.read_columns(place, ["txt"])["txt"]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(read, range(6 * NUM_PARTS)))

    assert found == [f"t{i % NUM_PARTS}" for i in range(6 * NUM_PARTS)]
    assert num_open_files() - before <= 16


def test_a_part_in_use_stays_open_while_all_others_are_read(reader: SnapshotReader) -> None:
    with reader.part(reader.files[0]) as part:
        assert sum(batch.num_rows for batch in reader.scan(["key"])) == NUM_PARTS

        assert part.read(columns=["key"])["key"].to_pylist() == ["k00"]


def test_an_abandoned_scan_gives_its_part_back(reader: SnapshotReader) -> None:
    before = num_open_files()

    for _ in range(40):
        scan = reader.scan(["key"])
        next(scan)
        scan.close()

    assert num_open_files() - before <= 1


def test_a_reader_travels_without_its_open_parts(reader: SnapshotReader) -> None:
    list(reader.scan(["key"]))

    other = pickle.loads(pickle.dumps(reader))

    assert [k for batch in other.scan(["key"]) for k in batch["key"].to_pylist()] == [
        f"k{i:02d}" for i in range(NUM_PARTS)
    ]
