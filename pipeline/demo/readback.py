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

from pipeline.cache import layout
from pipeline.cache.commit import Commit, read_commits, select_current
from pipeline.carved_cache import CachedImage, CarvedCache
from pipeline.dataset import Batch, CarvedDataset
from pipeline.decode import decode_image
from pipeline.demo.corpus import Corpus, read_images
from pipeline.demo.model import answer_both_ways
from pipeline.demo.report import Answer, CarvedPicture, DemoReport
from pipeline.evaluation.drawing import seen_image
from pipeline.job import Job
from pipeline.storage import Store
from pipeline.types import RejectedSample

_SHOWN = {"photo": 6, "quiz": 6, "scene": 1, "text": 1}  # pictures of each kind on the page
_QUESTIONS_PER_IMAGE = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    """An image of the cache."""

    image: CachedImage
    caption: str
    questions: Sequence[Mapping[str, str]]  # the few that are asked, spread over its families
    bytes_stored: int

    @property
    def kind(self) -> str:
        """As the corpus names it."""
        return self.image.key.split("-")[0]


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
    rows = list(_read_rows(cache))
    chosen = _choose(rows)
    shown = {row.image.key for row in chosen}
    wanted = [row.image.key for row in rows if row.questions or row.image.key in shown]
    encoded = read_images(corpus.shards, wanted)
    answers = _ask(rows, encoded, model)
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
        answers=[answer for of_image in answers.values() for answer in of_image],
        pictures=_pictures(job, chosen, encoded, answers),
    )


def _plugins(identity: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for kind in ("encoder", "carver", "codec"):
        yield kind, identity["config"][kind]


def _read_rejected(store: Store, commit: Commit) -> Iterator[RejectedSample]:
    path = layout.errors_path(commit.shard_id, commit.attempt)
    for row in pq.read_table(io.BytesIO(store.read(path))).to_pylist():
        yield RejectedSample(**row)


def _read_rows(cache: CarvedCache) -> Iterator[_Row]:
    """Go through the whole cache as training does."""
    dataset = CarvedDataset(cache, batch_size=64, columns=("txt", "json"))
    for batch in dataset:
        yield from _rows_of(batch)


def _rows_of(batch: Batch) -> Iterator[_Row]:
    captions, about = batch.columns["txt"], batch.columns["json"]
    for place, image, caption, text in zip(
        batch.places, batch.images(), captions, about, strict=True
    ):
        asked = json.loads(text).get("questions", [])
        yield _Row(
            image=image,
            caption=caption,
            questions=asked[:: max(1, len(asked) // _QUESTIONS_PER_IMAGE)][:_QUESTIONS_PER_IMAGE],
            bytes_stored=place.tokens_length + place.aux_length,
        )


def _ask(
    rows: Sequence[_Row], encoded: Mapping[str, bytes], model: Path
) -> dict[str, list[Answer]]:
    """Ask what is asked of each image; return the answers by key."""
    asked = [(row, question) for row in rows for question in row.questions]
    pixels = {
        key: Image.fromarray(decode_image(encoded[key], key=key))
        for key in {row.image.key for row, _ in asked}
    }
    pairs = answer_both_ways(
        model,
        [question["prompt"] for _, question in asked],
        [pixels[row.image.key] for row, _ in asked],
        [row.image for row, _ in asked],
    )
    answers: dict[str, list[Answer]] = {}
    for (row, question), (full, carved) in zip(asked, pairs, strict=True):
        answers.setdefault(row.image.key, []).append(
            Answer(prompt=question["prompt"], wanted=question["answer"], full=full, carved=carved)
        )
    return answers


def _choose(rows: Sequence[_Row]) -> list[_Row]:
    """Return a few images of each kind, no two of one caption."""
    chosen: list[_Row] = []
    left, captions = Counter(_SHOWN), set[str]()
    for row in sorted(rows, key=lambda row: row.image.key):
        if left[row.kind] > 0 and row.caption not in captions:
            left[row.kind] -= 1
            captions.add(row.caption)
            chosen.append(row)
    return chosen


def _pictures(
    job: Job,
    chosen: Sequence[_Row],
    encoded: Mapping[str, bytes],
    answers: Mapping[str, Sequence[Answer]],
) -> list[CarvedPicture]:
    return [
        CarvedPicture(
            key=row.image.key,
            caption=row.caption,
            image=seen_image(
                job.encoder.preprocess(decode_image(encoded[row.image.key], key=row.image.key)),
                row.image.grid[1:],
            ),
            positions=row.image.positions.tolist(),
            sizes=row.image.sizes.tolist(),
            bytes_in=len(encoded[row.image.key]),
            bytes_stored=row.bytes_stored,
            answers=answers.get(row.image.key, ()),
        )
        for row in chosen
    ]
