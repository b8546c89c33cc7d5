"""Every shard in every version, carved once with no Ray and no fault: the truth of all storms."""

import json
from pathlib import Path
from typing import Any

import yaml

from tests.chaos import rows
from tests.chaos.corpus import SHARDS, VERSIONS, Corpus, Version
from tests.chaos.forge import Forge
from tests.chaos.raw import LocalFolder
from tests.fakes import fake_config

HERE = Path(__file__).parent


class Library:
    """What must be stored of each version of each shard.

    Attributes:
        config: of all runs, but for input and output.
        path: of the truth as JSON.
    """

    def __init__(self, folder: Path, forge: Forge) -> None:
        self.config = folder / "run.yaml"
        self.config.write_text(yaml.safe_dump(_config()))
        self.path = folder / "library.json"
        places = [(folder / f"in-{v}", folder / f"cache-{v}") for v in VERSIONS]
        for version, (corpus, _) in zip(VERSIONS, places, strict=True):
            for shard in SHARDS:
                Corpus(LocalFolder(corpus)).put(shard, version)
        arguments = [path for pair in places for path in pair]
        carved = forge.run(HERE / "undisturbed.py", self.config, *arguments)
        assert carved.code == 0, carved.output
        self._known: dict[str, list[dict[str, Any]]] = {shard: [] for shard in SHARDS}
        for version, (_, cache) in zip(VERSIONS, places, strict=True):
            self._add(cache, folder / f"seen-{version}.json", forge)
        self.path.write_text(json.dumps(self._known))

    def __getitem__(self, version: Version) -> dict[str, Any]:
        """Return `rows` and `images`, digests by key, and `rejected` of a version of a shard."""
        return self._known[version[0]][version[1]]

    def _add(self, cache: Path, seen: Path, forge: Forge) -> None:
        looked = forge.run(HERE / "look.py", cache, seen)
        assert looked.code == 0, looked.output
        images = json.loads(seen.read_text())["images"]
        folder = LocalFolder(cache)
        for record in rows.records(folder):
            shard = record["shard"]["url"].rsplit("/", 1)[-1].removesuffix(".tar")
            stored = rows.committed_rows(folder, record)
            self._known[shard].append(
                {
                    "rows": stored,
                    "images": {key: images.pop(key) for key in stored},
                    "rejected": rows.rejected(folder, record),
                }
            )
        assert not images, "a reader sees what no commit holds"


def _config() -> dict[str, Any]:
    config = fake_config("nowhere", "nowhere").model_dump(mode="json")
    config["encoder"] = {"name": "paced", "options": {}}
    config["carver"] = {"name": "uniform_grid", "options": {"keep_tokens": 8}}
    config["runner"] = {
        **{"num_actors": 1, "gpus_per_actor": 0, "cpus_per_actor": 1, "batch_size": 2},
        # Of a storm's faults each may take an attempt; a shard that fails is done in the next run.
        **{"max_attempts": 4, "progress_s": 1.0},
    }
    return config
