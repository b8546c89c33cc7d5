"""The checks after a storm fail where they must."""

import re
from pathlib import Path
from typing import Any

import pytest

from pipeline.cache.commit import Commit, claim_identity
from pipeline.cache.snapshot import build_snapshot
from pipeline.storage import Store, open_store
from pipeline.types import ShardRef
from tests.cache.rows import IDENTITY, commit_rows, make_row, make_writer
from tests.chaos import inspection, look, rows
from tests.chaos.corpus import Corpus
from tests.chaos.raw import LocalFolder


class Setting:
    """A cache of two shards, and what is known of them."""

    def __init__(self, folder: Path) -> None:
        self.store: Store = open_store(str(folder / "cache"))
        claim_identity(self.store, IDENTITY)
        self.cache = LocalFolder(folder / "cache")
        self.corpus = Corpus(LocalFolder(folder / "in"))
        self.library: dict[tuple[str, int], dict[str, Any]] = {}
        self.commits = [self.carve(shard, 0) for shard in ("shard-00", "shard-01")]
        build_snapshot(self.store)

    def carve(self, shard: str, version: int) -> Commit:
        self.corpus.put(shard, version)
        stat = (self.corpus.folder.path / f"{shard}.tar").stat()
        etag = f"{stat.st_mtime_ns:x}-{stat.st_size:x}"
        values = {
            "shard": ShardRef(url=f"/in/{shard}.tar", size=stat.st_size, etag=etag),
            "work_fingerprint": f"{version:016x}",
            "num_written": 1,
        }
        row = make_row(f"s{shard[-2:]}-i000", num_tokens=4 + version)
        commit = commit_rows(self.store, shard, [row], commit=values)
        for record in rows.records(self.cache):
            if record["attempt"] == commit.attempt:
                stored = rows.committed_rows(self.cache, record)
                self.library[shard, version] = {"rows": stored, "rejected": []}
        return commit

    def contents(self, served: list[Commit]) -> dict[str, rows.Rows]:
        paths = {f.path for commit in served for f in commit.files if f.kind == "part"}
        return inspection.contents(self.corpus, self.cache, self.library, paths)


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(tmp_path)


def test_a_whole_cache_passes(setting: Setting) -> None:
    found = setting.contents(setting.commits)

    assert {shard: set(stored) for shard, stored in found.items()} == {
        "shard-00": {"s00-i000"},
        "shard-01": {"s01-i000"},
    }
    assert inspection.unreferenced(setting.cache) == set()
    assert inspection.num_to_do(setting.corpus, setting.cache) == 0


def test_a_lost_shard_is_seen(setting: Setting) -> None:
    with pytest.raises(AssertionError, match="shard-01 is committed and not served"):
        setting.contents(setting.commits[:1])


def test_a_shard_that_was_never_carved_is_seen(setting: Setting) -> None:
    setting.corpus.put("shard-05", 0)

    assert inspection.num_to_do(setting.corpus, setting.cache) == 1
    with pytest.raises(AssertionError, match="shards of the corpus are missing"):
        setting.contents(setting.commits)


def test_an_old_content_is_seen(setting: Setting) -> None:
    new = setting.carve("shard-00", 1)

    with pytest.raises(AssertionError, match=re.escape("shard-00: [0], not 1")):
        setting.contents(setting.commits)
    with pytest.raises(AssertionError, match="served 2 times"):
        setting.contents([*setting.commits, new])
    assert setting.contents([new, setting.commits[1]])


def test_a_removed_shard_must_stay(setting: Setting) -> None:
    setting.corpus.remove("shard-01")

    assert setting.contents(setting.commits).keys() == {"shard-00", "shard-01"}
    with pytest.raises(AssertionError, match="shard-01 is committed and not served"):
        setting.contents(setting.commits[:1])


def test_an_orphan_that_a_reader_is_given_is_seen_and_found_to_be_garbage(
    setting: Setting,
) -> None:
    with make_writer(setting.store, "shard-00") as writer:
        writer.write(make_row("s00-i000"))
        orphans = {file.path for file in writer.finish([])}
    (setting.cache.path / "commits" / ".x.carve-tmp").write_bytes(b"half a record")
    served = {f.path for commit in setting.commits for f in commit.files if f.kind == "part"}

    with pytest.raises(AssertionError, match="no commit names"):
        inspection.contents(setting.corpus, setting.cache, setting.library, served | orphans)
    found = inspection.unreferenced(setting.cache)
    assert found == orphans | {"commits/.x.carve-tmp"}
    assert inspection.attempts(found) == {f"data/shard-00/{writer.attempt}"}


@pytest.mark.parametrize("place", [40, -200], ids=["tokens", "footer"])
def test_a_changed_byte_is_seen(setting: Setting, place: int) -> None:
    path = next(f.path for f in setting.commits[0].files if f.kind == "part")
    data = bytearray(setting.cache.read(path))
    data[place] ^= 1
    setting.cache.write(path, bytes(data))

    with pytest.raises(AssertionError, match="part-00000"):
        setting.contents(setting.commits)


def test_a_lost_file_is_seen(setting: Setting) -> None:
    setting.cache.delete(setting.commits[0].files[0].path)

    with pytest.raises(AssertionError, match="named and not there"):
        inspection.unreferenced(setting.cache)


def test_a_view_must_be_whole_and_of_one_version() -> None:
    library = {
        "shard-00": [
            {"images": {"s00-i000": "a", "s00-i001": "b"}, "rows": {"s00-i000": "1", "x": "2"}},
            {"images": {"s00-i000": "c", "s00-i001": "d"}, "rows": {"s00-i000": "3", "x": "4"}},
        ]
    }

    def wrong(images: dict[str, str], scanned: list[str]) -> list[str]:
        return look.find_wrong({"images": images, "scanned": scanned}, library)

    assert wrong({"s00-i000": "a", "s00-i001": "b"}, ["1", "2"]) == []
    assert wrong({}, []) == []
    assert "no version" in wrong({"s00-i000": "a"}, ["1"])[0]
    assert "no version" in wrong({"s00-i000": "a", "s00-i001": "d"}, ["1", "4"])[0]
    assert "other rows" in wrong({"s00-i000": "a", "s00-i001": "b"}, ["1", "2", "2"])[0]
