"""Set the options of a carver that depend on the corpus, from a sample of it: `carve calibrate`.

Runs in one process and writes nothing. The sample is kept as encoded files, some hundred of them,
and encoded anew for each pass over it: full tokens would not fit in memory.
"""

import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from pipeline.carvers import Carver
from pipeline.decode import decode_image
from pipeline.encoders import Pixels
from pipeline.errors import ConfigError, SampleError
from pipeline.job import Job
from pipeline.source import expand_shards, read_shard
from pipeline.storage import open_input
from pipeline.types import RejectedSample, Sample, ShardRef, VisualTokens

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What became of a carver."""

    carver: Carver
    options: dict[str, Any]  # for the config: those it holds, and those that were set
    changed: frozenset[str]  # names of those that were set
    num_images: int
    kept_before: float  # mean over images of the share of the tokens that is kept
    kept_after: float
    rejected: Counter[str]  # samples left out, by reason


@dataclass(kw_only=True)
class CorpusSample:
    """Images of a corpus, encoded again in every pass, the same way each time.

    Iterating gives the tokens of one batch after another, on the device. Images that cannot be
    decoded, or whose tokens are not finite, are left out and counted in `rejected`.
    """

    job: Job  # its encoder is loaded
    samples: Sequence[Sample]
    rejected: Counter[str] = field(default_factory=Counter)

    def __iter__(self) -> Iterator[VisualTokens]:
        """Encode the sample."""
        self.rejected = Counter()
        size = self.job.config.runner.batch_size
        prepared = self._prepared()
        while batch := list(itertools.islice(prepared, size)):
            for group in self.job.encoder.encode_pixels(batch):
                finite = self._finite(group)
                if len(finite.features):
                    yield finite

    def _prepared(self) -> Iterator[Pixels]:
        for sample in self.samples:
            try:
                image = decode_image(sample.image, key=sample.key, options=self.job.decode)
                yield self.job.encoder.preprocess(image)
            except SampleError as err:
                self.rejected[err.reason] += 1

    def _finite(self, group: VisualTokens) -> VisualTokens:
        """Return the images of a group whose numbers are all finite."""
        values = (group.features, *group.signals.values())
        good_B = torch.stack([v.isfinite().flatten(1).all(dim=1) for v in values]).all(dim=0)
        if bool(good_B.all()):
            return group
        self.rejected["non_finite"] += int((~good_B).sum())
        return replace(
            group,
            features=group.features[good_B],
            signals={name: signal[good_B] for name, signal in group.signals.items()},
            image_indices=None,
        )


def calibrate(job: Job, *, num_samples: int, device: str | None = None) -> Calibration:
    """Encode a sample of a job's input and calibrate its carver on it.

    The sample is spread evenly over the shards, and taken from the start of each; the same input
    gives the same sample.

    Args:
        job: its encoder is loaded here.
        num_samples: images to read, at least 1; fewer where the input has fewer.
        device: a torch device; None for a GPU where there is one.

    Raises:
        ConfigError: no image of the sample can be used, or the weights cannot be loaded.
        ShardError: a shard of the sample is damaged before the images that are read from it.
        StorageError: the input cannot be read.
    """
    images, unread = read_sample(job, num_samples)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, job.config.runner.dtype)
    job.encoder.load(device=device, dtype=dtype, signals=job.carver.needs)
    sample = CorpusSample(job=job, samples=images)
    num_images, before = _kept_share(job.carver, sample)
    rejected = unread + sample.rejected
    if num_images == 0:
        reasons = ", ".join(f"{reason} {count}" for reason, count in rejected.most_common())
        raise ConfigError(
            f"input.shards={job.config.input.shards!r}: no image of the sample can be used "
            f"({reasons or 'the shards hold none'})"
        )
    logger.info("%d images encoded on %s, calibrating", num_images, device)
    carver = job.carver.calibrated(sample)
    changes = _changes(job.carver, carver)
    return Calibration(
        carver=carver,
        options={**job.config.carver.options, **changes},
        changed=frozenset(changes),
        num_images=num_images,
        kept_before=before,
        kept_after=_kept_share(carver, sample)[1] if changes else before,
        rejected=rejected,
    )


def read_sample(job: Job, num_samples: int) -> tuple[list[Sample], Counter[str]]:
    """Return about as many encoded images of a job's input, and why others were rejected.

    Where a shard has fewer than its share, the next ones give more.
    """
    shards = expand_shards(
        job.config.input.shards, allow_list_schemes=job.config.input.allow_list_schemes
    )
    chosen = _evenly(shards, num_samples)
    images: list[Sample] = []
    rejected: Counter[str] = Counter()
    for place, shard in enumerate(chosen, start=1):
        wanted = num_samples * place // len(chosen) - len(images)
        with open_input(shard) as stream:
            found = read_shard(shard, job.source, stream=stream)
            while wanted > 0 and (sample := next(found, None)) is not None:
                if isinstance(sample, RejectedSample):
                    rejected[sample.reason] += 1
                else:
                    images.append(sample)
                    wanted -= 1
    return images, rejected


def _evenly(shards: Sequence[ShardRef], count: int) -> list[ShardRef]:
    """Return at most `count` shards, spread over all of them."""
    chosen = min(count, len(shards))
    return [shards[(2 * i + 1) * len(shards) // (2 * chosen)] for i in range(chosen)]


def _kept_share(carver: Carver, sample: CorpusSample) -> tuple[int, float]:
    """Return the number of images, and the mean share of their tokens that a carver keeps."""
    shares = [
        len(result.positions) / tokens.features.shape[1]
        for tokens in sample
        for result in carver.carve(tokens)
    ]
    return len(shares), sum(shares) / max(1, len(shares))


def _changes(before: Carver, after: Carver) -> dict[str, Any]:
    values = {f.name: (getattr(before, f.name), getattr(after, f.name)) for f in fields(before)}
    return {name: new for name, (old, new) in values.items() if new != old}
