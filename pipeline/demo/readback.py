"""Read a carved demo back, as a user of the cache would, and put the report's facts together."""

import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image
from torch.utils.data import DataLoader

from pipeline.cache import layout
from pipeline.cache.commit import Commit, read_commits, select_current
from pipeline.carved_cache import CachedImage, CarvedCache
from pipeline.dataset import Batch, CarvedDataset
from pipeline.decode import decode_image
from pipeline.demo.corpus import Corpus, read_images
from pipeline.demo.model import answer_both_ways
from pipeline.demo.report import CarvedPicture, DemoReport
from pipeline.evaluation.drawing import seen_image
from pipeline.job import Job
from pipeline.storage import Store
from pipeline.types import RejectedSample

_SHOWN = {"photo": 8, "scene": 2, "text": 2}  # pictures of each kind, no two of one caption


@dataclass(frozen=True, kw_only=True, slots=True)
class _Chosen:
    """An image to show."""

    image: CachedImage
    caption: str
    bytes_stored: int


def read_report(job: Job, cache: CarvedCache, corpus: Corpus, *, model: Path) -> DemoReport:
    """Read every row of the cache by the loader, ask the model, and count.

    Args:
        job: that filled the cache.
        cache: opened.
        corpus: that was carved.
        model: folder of the checkpoint.
    """
    store = cache.reader.store
    commits = select_current(read_commits(store))
    stages: Counter[str] = Counter()
    for commit in commits:
        stages.update(commit.details["stage_seconds"])
    num_actors = len({commit.details["pid"] for commit in commits})
    return DemoReport(
        plugins={
            kind: f"{plugin['name']} {json.dumps(plugin['options'])}"
            for kind, plugin in _plugins(cache.identity)
        },
        versions=cache.identity["versions"],
        num_actors=num_actors,
        num_shards=len(commits),
        num_images=sum(c.num_written for c in commits),
        bytes_in=sum(c.bytes_in for c in commits),
        tokens_full=sum(c.tokens_full for c in commits),
        tokens_kept=sum(c.tokens_kept for c in commits),
        width=cache.width,
        bytes_tokens=sum(c.bytes_tokens for c in commits),
        bytes_files=sum(f.size for c in commits for f in c.files),
        seconds=max(c.committed_at for c in commits)
        - min(c.committed_at - c.seconds for c in commits),
        stage_seconds=dict(stages),
        rejected=[r for commit in commits for r in _read_rejected(store, commit)],
        pictures=_pictures(job, cache, corpus, model),
    )


def _plugins(identity: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for kind in ("encoder", "carver", "codec"):
        yield kind, identity["config"][kind]


def _read_rejected(store: Store, commit: Commit) -> Iterator[RejectedSample]:
    path = layout.errors_path(commit.shard_id, commit.attempt)
    for row in pq.read_table(io.BytesIO(store.read(path))).to_pylist():
        yield RejectedSample(**row)


def _pictures(job: Job, cache: CarvedCache, corpus: Corpus, model: Path) -> list[CarvedPicture]:
    chosen = _choose(cache)
    encoded = read_images(corpus.shards, [c.image.key for c in chosen])
    decoded = [decode_image(encoded[c.image.key], key=c.image.key) for c in chosen]
    answers = answer_both_ways(
        model, [Image.fromarray(pixels) for pixels in decoded], [c.image.features for c in chosen]
    )
    return [
        CarvedPicture(
            key=c.image.key,
            caption=c.caption,
            image=seen_image(job.encoder.preprocess(pixels), c.image.grid[1:]),
            positions=c.image.positions.tolist(),
            sizes=c.image.sizes.tolist(),
            bytes_in=len(encoded[c.image.key]),
            bytes_stored=c.bytes_stored,
            answers=pair,
        )
        for c, pixels, pair in zip(chosen, decoded, answers, strict=True)
    ]


def _choose(cache: CarvedCache) -> list[_Chosen]:
    """Go through the whole cache as training does, and keep a few images of each kind."""
    dataset = CarvedDataset(cache, columns=("txt",))
    loader = DataLoader(dataset, batch_size=64, collate_fn=dataset.collate)
    chosen: list[_Chosen] = []
    left, captions = Counter(_SHOWN), set[str]()
    for batch in loader:
        for candidate in _candidates(batch):
            kind = candidate.image.key.split("-")[0]
            if left[kind] > 0 and candidate.caption not in captions:
                left[kind] -= 1
                captions.add(candidate.caption)
                chosen.append(candidate)
    return sorted(chosen, key=lambda c: c.image.key)


def _candidates(batch: Batch) -> Iterator[_Chosen]:
    captions: Sequence[str] = batch.columns["txt"]
    for row, image, caption in zip(batch.rows, batch.images(), captions, strict=True):
        stored = row.place.tokens_length + row.place.aux_length
        yield _Chosen(image=image, caption=caption, bytes_stored=stored)
