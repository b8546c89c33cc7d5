"""The images of an evaluation, in batches that are the same in every process."""

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pipeline.errors import ConfigError, SampleError, StorageError
from pipeline.evaluation.questions import Question, Questions
from pipeline.source import SourceOptions, expand_shards, read_shard
from pipeline.storage import find_inputs, open_input, read_input
from pipeline.types import RejectedSample, Sample, ShardRef


@dataclass(frozen=True, kw_only=True, slots=True)
class AskedImage:
    """One image with its questions, still encoded."""

    number: int  # from 0, in the order of the input
    sample: Sample
    questions: Sequence[Question]


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSource:
    """Where the images are.

    Args:
        shards: of webdataset samples, or empty.
        images: folder of images, or a pattern; used where there are no shards.
        options: how shards are read, and which suffixes are images.
        max_images: at most so many with questions; None for all.
        allow_list_schemes: see `expand_shards`.
    """

    shards: str | Sequence[str]
    images: str
    options: SourceOptions
    max_images: int | None
    allow_list_schemes: Sequence[str] = ()

    def check(self) -> None:
        """Raise what is wrong with the input, before weights are loaded.

        Raises:
            ConfigError: there are no images.
            StorageError: the input cannot be reached.
        """
        if self.shards:
            self._shards()
        else:
            self._image_files()

    def asked(self, questions: Questions, rejected: Counter[str]) -> Iterator[AskedImage]:
        """Yield the images that have questions; of equal keys the first.

        Args:
            questions: on each image.
            rejected: counts the samples that cannot be used, by reason.

        Raises:
            ShardError: a shard is damaged.
            StorageError: the input cannot be read.
        """
        groups = self._shard_groups() if self.shards else [(1.0, self._from_files())]
        seen: set[str] = set()
        number = 0
        for share, samples in groups:
            wanted = None if self.max_images is None else round(self.max_images * share) - number
            for image in itertools.islice(_ask(samples, questions, rejected, seen), wanted):
                yield AskedImage(number=number, sample=image[0], questions=image[1])
                number += 1

    def _shard_groups(self) -> Iterator[tuple[float, Iterator[Sample | RejectedSample]]]:
        """Yield the samples of each shard with the share of all images due by its end.

        Where a shard has fewer than its share, the next ones give more.
        """
        shards = self._shards()
        if self.max_images is not None and self.max_images < len(shards):
            step = len(shards) / self.max_images
            shards = [shards[int((i + 0.5) * step)] for i in range(self.max_images)]
        for place, shard in enumerate(shards, start=1):
            yield place / len(shards), self._from_shard(shard)

    def _shards(self) -> Sequence[ShardRef]:
        return expand_shards(self.shards, allow_list_schemes=self.allow_list_schemes)

    def _from_shard(self, shard: ShardRef) -> Iterator[Sample | RejectedSample]:
        with open_input(shard) as stream:
            yield from read_shard(shard, self.options, stream=stream)

    def _from_files(self) -> Iterator[Sample | RejectedSample]:
        for file in self._image_files():
            stem, _, suffix = file.url.rsplit("/", 1)[-1].rpartition(".")
            try:
                yield Sample(key=stem, image=read_input(file.url), suffix=suffix.lower())
            except StorageError as err:
                yield RejectedSample(
                    key=stem, stage="source", reason="unreadable", message=str(err)
                )

    def _image_files(self) -> list[ShardRef]:
        suffixes = tuple(f".{suffix}" for suffix in self.options.image_suffixes)
        files = [
            file
            for file in find_inputs(self.images, suffix="")
            if file.url.lower().endswith(suffixes)
        ]
        if not files:
            known = ", ".join(self.options.image_suffixes)
            raise ConfigError(f"images={self.images!r}: there is no image ({known})")
        return files


@dataclass(kw_only=True)
class Batches:
    """One of several equal shares of the batches of an input, cut before anything is decoded.

    So a batch holds the same images whoever works on it, and all its numbers are the same.

    Attributes:
        rejected: samples that could not be read, by reason; complete after the iteration, and
            counted by share 0 alone.
    """

    source: ImageSource
    questions: Questions
    batch_size: int
    share: int = 0
    num_shares: int = 1
    rejected: Counter[str] = field(default_factory=Counter)

    def __iter__(self) -> Iterator[list[AskedImage]]:
        """Yield the batches of this share."""
        seen = Counter[str]()
        images = self.source.asked(self.questions, seen)
        for number in itertools.count():
            batch = list(itertools.islice(images, self.batch_size))
            if not batch:
                break
            if number % self.num_shares == self.share:
                yield batch
        if self.share == 0:
            self.rejected += seen


def _ask(
    samples: Iterator[Sample | RejectedSample],
    questions: Questions,
    rejected: Counter[str],
    seen: set[str],
) -> Iterator[tuple[Sample, Sequence[Question]]]:
    for sample in samples:
        if isinstance(sample, RejectedSample):
            rejected[sample.reason] += 1
            continue
        if sample.key in seen:
            rejected["duplicate_key"] += 1
            continue
        seen.add(sample.key)
        try:
            asked = questions.of(sample)
        except SampleError as err:
            rejected[err.reason] += 1
            continue
        if asked:
            yield sample, asked
