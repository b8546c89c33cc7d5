"""A corpus that grows, changes and shrinks: 18 shards, each of which exists in three versions."""

import functools
import io
import random
import tarfile
from collections.abc import Sequence

from tests.chaos.raw import RawFolder
from tests.fakes import encoded_image

SHARDS = tuple(f"shard-{number:02d}" for number in range(18))
VERSIONS = (0, 1, 2)
Version = tuple[str, int]  # name of a shard, and which of its contents


@functools.cache
def content(shard: str, version: int) -> bytes:
    """Return a shard: keys that all its versions share, images that none of them do.

    Some are empty, some have an image that cannot be read; all differ in length of the list.
    """
    number = SHARDS.index(shard)
    rng = random.Random(f"{shard} {version}")
    count = 0 if number % 6 == 2 and version != 1 else rng.randint(5, 12)
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for place in range(count):
            key = f"s{number:02d}-i{place:03d}"
            seed = (number * 3 + version) * 100 + place
            image = encoded_image(seed, size=(48, 40 + place))
            if number % 4 == 1 and place == version:
                image = image[:90]
            text = f"caption of {key} in version {version}".encode()
            for suffix, data in (("jpg", image), ("txt", text)):
                entry = tarfile.TarInfo(f"{key}.{suffix}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return sink.getvalue()


class Corpus:
    """Shards in a folder, and all that they ever were.

    Attributes:
        now: version of each shard that is there.
    """

    def __init__(self, folder: RawFolder) -> None:
        self.folder = folder
        self.now: dict[str, int] = {}
        self._versions: dict[tuple[str, str], int] = {}  # by shard and what the store calls it

    def put(self, shard: str, version: int) -> None:
        """Add or replace a shard."""
        etag = self.folder.write(f"{shard}.tar", content(shard, version))
        self._versions[shard, etag] = version
        self.now[shard] = version

    def remove(self, shard: str) -> None:
        """Remove a shard."""
        self.folder.delete(f"{shard}.tar")
        del self.now[shard]

    def version(self, url: str, etag: str) -> Version:
        """Return which version a commit record is of."""
        shard = url.rsplit("/", 1)[-1].removesuffix(".tar")
        return shard, self._versions[shard, etag]

    def change(self, changes: Sequence["Change"]) -> None:
        """Apply changes in order."""
        for kind, shard, version in changes:
            if kind == "remove":
                self.remove(shard)
            else:
                self.put(shard, version)


Change = tuple[str, str, int]  # grow, change, put_back or remove; a shard; its version


def draw_changes(rng: random.Random, history: dict[str, list[int]]) -> tuple[Change, ...]:
    """Draw what happens to a corpus between two runs.

    Args:
        rng: of the storm.
        history: versions that each shard has had, the present one last, -1 for removed; changed.
    """
    changes: list[Change] = []
    here = [shard for shard in SHARDS if history.get(shard, [-1])[-1] >= 0]
    away = [shard for shard in SHARDS if shard not in history]
    changes += [("grow", shard, 0) for shard in rng.sample(away, min(len(away), rng.randint(0, 3)))]
    rng.shuffle(here)
    for shard in here[: rng.randint(0, 3)]:
        past = set(history[shard][:-1])
        version = rng.choice([v for v in VERSIONS if v != history[shard][-1]])
        changes.append(("put_back" if version in past else "change", shard, version))
    for shard in here[3 : 3 + rng.randint(0, 2)]:
        changes.append(("remove", shard, -1))
    for _, shard, version in changes:
        history.setdefault(shard, []).append(version)
    return tuple(changes)
