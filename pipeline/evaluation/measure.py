"""Measure a grid of variants: encode once, carve, pack and unpack as a cache does, ask.

B images of a batch, N tokens, K kept, D width.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress

import pyarrow as pa
import torch
from torch import Tensor

from pipeline.carved_cache import CachedImage
from pipeline.codecs import Codec
from pipeline.decode import decode_image
from pipeline.encoders import Pixels
from pipeline.errors import SampleError
from pipeline.evaluation.answers import Answers, LanguageModel, PromptBatch, load_model
from pipeline.evaluation.images import AskedImage
from pipeline.evaluation.information import effective_ranks, spectrum_shares
from pipeline.evaluation.records import BatchRecords, ImageFacts
from pipeline.evaluation.rows import read_back, store
from pipeline.evaluation.stability import DISTURBANCES, disturbed, overlap
from pipeline.evaluation.task import EvaluationTask
from pipeline.evaluation.variants import Cut, tokens_of
from pipeline.types import CarvedTokens, Placement, VisualTokens


@dataclass(frozen=True, kw_only=True)
class _Encoded:
    """One batch behind the encoder: images whose numbers are all finite."""

    images: Sequence[AskedImage]
    groups: Sequence[VisualTokens]  # `image_indices` count in `images`
    copies: dict[str, Sequence[VisualTokens]]  # by disturbance, of the first images
    prompts: PromptBatch

    @property
    def full(self) -> list[Tensor]:
        """(N, D) of each image."""
        rows: list[Tensor] = [torch.empty(0)] * len(self.images)
        for group in self.groups:
            for index, features_ND in zip(_indices(group), group.features, strict=True):
                rows[index] = features_ND
        return rows

    def carve(
        self, cut: Cut, groups: Sequence[VisualTokens]
    ) -> tuple[list[CarvedTokens], list[float]]:
        """Return what a cut leaves of each image of some groups, and the seconds it took."""
        found: dict[int, tuple[CarvedTokens, float]] = {}
        for group in groups:
            _wait(group.features)
            started = time.perf_counter()
            results = cut.carver.carve(group)
            _wait(group.features)
            seconds = (time.perf_counter() - started) / len(results)
            found |= {i: (one, seconds) for i, one in zip(_indices(group), results, strict=True)}
        carved, seconds_B = zip(*(found[index] for index in sorted(found)), strict=True)
        return list(carved), list(seconds_B)


@dataclass(kw_only=True)
class _Memory:
    """Answers of one carver on one batch: equal tokens need not be asked about twice.

    A prefix of a nested carver's result often is what carving to fewer tokens gives.
    """

    carver: tuple[str, str] = ("", "")
    known: list[tuple[Placement, list[Tensor], Answers]]

    def keep_only(self, cut: Cut) -> None:
        """Forget what is known of other carvers than a cut's."""
        if self.carver != (cut.name, cut.options):
            self.carver, self.known = (cut.name, cut.options), []

    def find(self, placement: Placement, told: list[Tensor]) -> Answers | None:
        """Return the answers to the same tokens, all that the model is told of them."""
        for other, others, answers in self.known:
            if other == placement and all(map(torch.equal, told, others)):
                return answers
        return None


class Measurer:
    """Measures batches of images in one process.

    Args:
        task: what to measure.
        device: a torch device.

    Attributes:
        rejected: images that could not be decoded or encoded, by reason.
    """

    def __init__(self, task: EvaluationTask, *, device: str = "cpu") -> None:
        self.task = task
        self.device = device
        self.dtype: torch.dtype = getattr(torch, task.config.runner.dtype)
        self.rejected: Counter[str] = Counter()
        self.language: LanguageModel

    def load(self) -> None:
        """Load encoder and language model.

        Raises:
            ConfigError: they cannot be loaded, or do not fit the template.
        """
        task = self.task
        self.language = load_language(task, dtype=self.dtype, device=self.device)
        task.encoder.load(device=self.device, dtype=self.dtype, signals=task.grid.needs)

    def measure(self, batch: Sequence[AskedImage]) -> tuple[pa.Table, pa.Table] | None:
        """Return the (answers, images) rows of a batch; None where no image can be used.

        Raises:
            ConfigError: a prompt holds an image token.
            NonFiniteError: a carved value does not fit a codec.
        """
        encoded = self._encode(batch)
        if encoded is None:
            return None
        full = encoded.full
        reference = self.language.ask(encoded.prompts, full)
        records = BatchRecords(
            images=encoded.images,
            full_ranks=effective_ranks(full),
            reference=reference,
            language=self.language,
        )
        memory = _Memory(known=[])
        for cut in self.task.grid.cuts:
            memory.keep_only(cut)
            self._measure_cut(cut, encoded, full, records, memory)
        return records.tables()

    def _measure_cut(
        self,
        cut: Cut,
        encoded: _Encoded,
        full: Sequence[Tensor],
        records: BatchRecords,
        memory: _Memory,
    ) -> None:
        carved, seconds = encoded.carve(cut, encoded.groups)
        copies = {kind: encoded.carve(cut, groups)[0] for kind, groups in encoded.copies.items()}
        for read in cut.reads:
            counts = [
                len(one.positions) if read == cut.budget else _prefix(read, len(all_ND), one)
                for one, all_ND in zip(carved, full, strict=True)
            ]
            kept = [one.features[one.ranks < n] for one, n in zip(carved, counts, strict=True)]
            facts = ImageFacts(
                tokens=counts,
                num_bytes=[],
                effective_rank=effective_ranks(kept),
                spectrum_share=spectrum_shares(full, kept),
                carve_s=seconds,
                overlaps={kind: _overlaps(carved, copies[kind], counts) for kind in copies},
                kept=[],
            )
            for plugin, codec in cut.codecs:
                found = self._through_cache(carved, codec, counts, facts, full)
                for placement in cut.placements:
                    answers = self._ask(encoded.prompts, found.kept, placement, memory)
                    records.add(cut.variant(plugin, read, placement), answers, found)

    def _through_cache(
        self,
        carved: Sequence[CarvedTokens],
        codec: Codec,
        counts: Sequence[int],
        facts: ImageFacts,
        full: Sequence[Tensor],
    ) -> ImageFacts:
        """Store and read carved images; return the facts completed."""
        rows = [
            store(one, codec, num_source=len(all_ND))
            for one, all_ND in zip(carved, full, strict=True)
        ]
        images = read_back(rows, codec, keep_tokens=counts, device=self.device, dtype=self.dtype)
        num_bytes = [row.bytes_read(n) for row, n in zip(rows, counts, strict=True)]
        return replace(facts, num_bytes=num_bytes, kept=images)

    def _ask(
        self,
        prompts: PromptBatch,
        images: Sequence[CachedImage],
        placement: Placement,
        memory: _Memory,
    ) -> Answers:
        told = [image.features for image in images]
        if placement != "packed":
            told += [values for image in images for values in (image.positions, image.sizes)]
        answers = memory.find(placement, told)
        if answers is None:
            answers = self.language.ask(prompts, images, placement=placement)
            memory.known.append((placement, told, answers))
        return answers

    def _encode(self, batch: Sequence[AskedImage]) -> _Encoded | None:
        prepared = [
            (image, pixels) for image in batch if (pixels := self._prepare(image)) is not None
        ]
        if not prepared:
            return None
        groups = self.task.encoder.encode_pixels([pixels for _, pixels in prepared])
        good = _finite(groups, len(prepared))
        self.rejected["non_finite"] += good.count(False)
        if not any(good):
            return None
        prepared = list(compress(prepared, good))
        images = [image for image, _ in prepared]
        return _Encoded(
            images=images,
            groups=_select(groups, good),
            copies=self._disturb(prepared),
            prompts=self.language.lay_out([[q.prompt for q in i.questions] for i in images]),
        )

    def _prepare(self, image: AskedImage) -> Pixels | None:
        try:
            pixels = decode_image(
                image.sample.image, key=image.sample.key, options=self.task.decode
            )
            return self.task.encoder.preprocess(pixels)
        except SampleError as err:
            self.rejected[err.reason] += 1
            return None

    def _disturb(
        self, prepared: Sequence[tuple[AskedImage, Pixels]]
    ) -> dict[str, Sequence[VisualTokens]]:
        """Encode disturbed copies of those images that belong to the first of all."""
        asked = self.task.config.evaluation
        # Numbers rise, so they are the first of the batch too.
        first = [(i.sample.key, p) for i, p in prepared if i.number < asked.stability_images]
        if not first:
            return {}
        return {
            kind: self.task.encoder.encode_pixels(
                [disturbed(pixels, kind, key=key, seed=asked.seed) for key, pixels in first]
            )
            for kind in DISTURBANCES
        }


def load_language(
    task: EvaluationTask, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> LanguageModel:
    """Load the model that an evaluation asks.

    Raises:
        ConfigError: it cannot be loaded, or does not fit the template.
    """
    asked = task.config.evaluation
    model, processor = load_model(task.model, revision=task.revision, dtype=dtype, device=device)
    return LanguageModel(
        model=model,
        processor=processor,
        stage=task.stage,
        template=asked.template,
        max_new_tokens=asked.max_new_tokens,
    )


def _prefix(read: float, num_tokens: int, carved: CarvedTokens) -> int:
    return min(len(carved.positions), tokens_of(read, num_tokens))


def _overlaps(
    carved: Sequence[CarvedTokens], copies: Sequence[CarvedTokens], counts: Sequence[int]
) -> list[float]:
    """Return the overlap of each image with its copy; the first ones have a copy."""
    pairs = zip(carved, copies, counts, strict=False)
    return [overlap(one, copy, first=count) for one, copy, count in pairs]


def _indices(group: VisualTokens) -> Sequence[int]:
    return range(len(group.features)) if group.image_indices is None else group.image_indices


def _finite(groups: Sequence[VisualTokens], num_images: int) -> list[bool]:
    """Return for each image whether all its numbers are finite."""
    good = [True] * num_images
    for group in groups:
        values = (group.features, *group.signals.values())
        is_good_B = torch.stack([v.isfinite().flatten(1).all(dim=1) for v in values]).all(dim=0)
        for index, is_good in zip(_indices(group), is_good_B.tolist(), strict=True):
            good[index] = is_good
    return good


def _select(groups: Sequence[VisualTokens], good: Sequence[bool]) -> list[VisualTokens]:
    """Return the good images of each group, numbered anew."""
    new = {old: place for place, old in enumerate(compress(range(len(good)), good))}
    selected = []
    for group in groups:
        places = [place for place, index in enumerate(_indices(group)) if good[index]]
        if not places:
            continue
        selected.append(
            replace(
                group,
                features=group.features[places],
                signals={name: values[places] for name, values in group.signals.items()},
                image_indices=tuple(new[_indices(group)[place]] for place in places),
            )
        )
    return selected


def _wait(tensor: Tensor) -> None:
    """Wait for an accelerator, so that seconds are those of the work."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
