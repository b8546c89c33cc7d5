"""What must hold after a storm, found from raw listings and bytes."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from tests.chaos import rows
from tests.chaos.corpus import Corpus
from tests.chaos.library import Library
from tests.chaos.raw import RawFolder

TEMPORARY = ".carve-tmp"


def contents(
    corpus: Corpus, cache: RawFolder, library: Library, served: set[str]
) -> dict[str, rows.Rows]:
    """Return the rows of every shard that a reader is given, by shard.

    Every shard of the corpus must be there as it is now. A shard that was removed stays, by
    design, with a content that was committed; it is there if and only if it ever was.

    Args:
        corpus: what was carved.
        cache: where to.
        library: what must come out.
        served: the files that a reader is given.

    Raises:
        AssertionError: anything is not as an undisturbed run makes it.
    """
    found, rest = {}, set(served)
    for shard, commits in _commits(corpus, cache, library).items():
        # Of an empty content there is no file to see whether it is the one that counts.
        counting = [version for version, parts in commits if parts and parts <= served]
        empty = [version for version, parts in commits if not parts]
        assert len(counting) < 2, f"{shard} is served {len(counting)} times"
        assert counting or empty, f"{shard} is committed and not served"
        if shard in corpus.now:
            version = corpus.now[shard]
            assert version in (counting or empty), f"{shard}: {counting or empty}, not {version}"
        else:
            version = (counting or empty)[0]
        found[shard] = library[shard, version]["rows"]
        rest -= set().union(*(parts for _, parts in commits if parts <= served))
    assert not rest, f"a reader is given what no commit names: {rest}"
    missing = corpus.now.keys() - found.keys()
    assert not missing, f"shards of the corpus are missing: {missing}"
    return found


def _commits(
    corpus: Corpus, cache: RawFolder, library: Library
) -> dict[str, list[tuple[int, set[str]]]]:
    """Return version and parts of every commit, by shard; check all of them against the truth.

    Also those that a later one has overtaken: older snapshots read them.
    """
    found: dict[str, list[tuple[int, set[str]]]] = {}
    for record in rows.records(cache):
        shard, version = corpus.version(record["shard"]["url"], record["shard"]["etag"])
        assert rows.committed_rows(cache, record) == library[shard, version]["rows"], shard
        assert rows.rejected(cache, record) == library[shard, version]["rejected"], shard
        found.setdefault(shard, []).append((version, _parts(record)))
    return found


def check_view(view: dict[str, Any], found: Mapping[str, rows.Rows], library: Library) -> None:
    """Check that a reader gets just these rows, each key once, by scan and by key."""
    expected = {key: digest for shard in found.values() for key, digest in shard.items()}
    assert len(expected) == sum(map(len, found.values())), "two shards share a key"
    assert Counter(view["scanned"]) == Counter(expected.values())
    assert view["images"].keys() == expected.keys()
    known = json.loads(library.path.read_text())
    for shard, stored in found.items():
        images = {key: view["images"][key] for key in stored}
        fitting = [version["images"] for version in known[shard] if version["rows"] == stored]
        assert images in fitting, f"images of {shard} differ"


def unreferenced(cache: RawFolder) -> set[str]:
    """Return every file of a cache that nothing names."""
    listed = set(cache.list())
    kept = {path for path in listed if path.startswith("runs/") or path == "carve.json"}
    kept |= {path for path in listed if path.startswith("commits/") and path.endswith(".json")}
    for record in rows.records(cache):
        kept |= {file["path"] for file in record["files"]}
    for path in listed:
        if path.startswith("snapshots/") and path.endswith("/snapshot.json"):
            # Its record names its tables, and may name those of snapshots before it.
            named = set(_strings(json.loads(cache.read(path))))
            kept |= {path} | {name for name in named if name.startswith("snapshots/")}
    missing = kept - listed
    assert not missing, f"named and not there: {missing}"
    return {path for path in listed if path not in kept or path.endswith(TEMPORARY)}


def attempts(paths: set[str]) -> set[str]:
    """Return the folders of the attempts that some files are of."""
    return {path.rsplit("/", 1)[0] for path in paths if path.startswith("data/")}


def num_to_do(corpus: Corpus, cache: RawFolder) -> int:
    """Return how many shards of the corpus no commit covers."""
    done = set()
    for record in rows.records(cache):
        done.add(corpus.version(record["shard"]["url"], record["shard"]["etag"]))
    return len(set(corpus.now.items()) - done)


def _strings(value: Any) -> Iterator[str]:
    """Yield every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings(list(value.values()))
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)


def _parts(record: Mapping[str, Any]) -> set[str]:
    return {file["path"] for file in record["files"] if file["kind"] == "part"}
