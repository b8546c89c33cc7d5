"""Look at a cache as its readers do.

look.py URL OUT                   once: every row, by scan and by key, to OUT
look.py URL OUT LIBRARY STOP      compared with LIBRARY, until the file STOP is there
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pipeline
from pipeline.errors import CacheFormatError
from tests.chaos import rows

_SHARE = 0.1  # of the time; it must not slow down what it watches
_LONGEST_PAUSE_S = 10.0


def look(url: str) -> dict[str, Any]:
    """Return what a reader sees: its snapshot, rows by scan and images by key."""
    cache = pipeline.open_cache(url)
    keys = list(cache.keys())
    assert len(keys) == len(set(keys)) == len(cache), "a key is there twice"
    scanned = [rows.stored_digest(row) for batch in cache.scan() for row in batch.to_pylist()]
    images = {image.key: rows.image_digest(image) for image in cache.get_many(keys)}
    return {
        "snapshot": cache.reader.snapshot.number,
        "files": sorted(cache.reader.files),
        "scanned": sorted(scanned),
        "images": images,
    }


def find_wrong(seen: dict[str, Any], library: dict[str, Any]) -> list[str]:
    """Return what is wrong with a view: each shard must be whole and of one version."""
    by_shard: dict[str, dict[str, str]] = {}
    for key, digest in seen["images"].items():
        by_shard.setdefault("shard-" + key[1:3], {})[key] = digest
    wrong, stored = [], []
    for shard, images in by_shard.items():
        fitting = [version for version in library[shard] if version["images"] == images]
        if fitting:
            stored += fitting[0]["rows"].values()
        else:
            wrong.append(f"{shard} is no version of it: {sorted(images)}")
    if not wrong and sorted(stored) != seen["scanned"]:
        wrong.append("a scan gives other rows than the index names")
    return wrong


def watch(url: str, library: dict[str, Any], stop: Path) -> dict[str, Any]:
    """Look until told to stop."""
    found: dict[str, Any] = {"looks": 0, "images": 0, "snapshots": [], "wrong": []}
    while not stop.exists():
        started = time.monotonic()
        try:
            seen = look(url)
        except CacheFormatError as err:
            # Only before the first run has made it one.
            if found["looks"] or "is not a cache" not in str(err):
                found["wrong"].append(str(err))
        else:
            found["looks"] += 1
            found["images"] += len(seen["images"])
            if seen["snapshot"] not in found["snapshots"]:
                found["snapshots"].append(seen["snapshot"])
            found["wrong"] += find_wrong(seen, library)
        pause_until = started + min(_LONGEST_PAUSE_S, (time.monotonic() - started) / _SHARE)
        while not stop.exists() and time.monotonic() < pause_until:
            time.sleep(0.1)
    return found


if __name__ == "__main__":
    url, out, *rest = sys.argv[1:]
    if rest:
        known = json.loads(Path(rest[0]).read_text())
        result = watch(url, known, Path(rest[1]))
    else:
        result = look(url)
    Path(out).write_text(json.dumps(result))
