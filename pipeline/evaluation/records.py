"""The rows of one batch, column by column.

B images, Q questions on them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import torch
from torch import Tensor

from pipeline.carved_cache import CachedImage
from pipeline.evaluation.answers import Answers, LanguageModel
from pipeline.evaluation.images import AskedImage
from pipeline.evaluation.questions import is_right
from pipeline.evaluation.results import ANSWERS, IMAGES, variant_columns
from pipeline.evaluation.stability import DISTURBANCES
from pipeline.evaluation.variants import Variant

POSITIONS_OF = 64
"""What was kept is stored of the first so many images."""


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """What one variant came to on each image of a batch, beside the answers."""

    tokens: Sequence[int]
    num_bytes: Sequence[int]
    effective_rank: Sequence[float]
    spectrum_share: Sequence[float]
    carve_s: Sequence[float]
    overlaps: dict[str, list[float]]  # by disturbance, of the first images of the batch
    kept: Sequence[CachedImage]  # as read back


@dataclass(kw_only=True)
class BatchRecords:
    """Collects the rows of one batch.

    Args:
        images: of the batch.
        full_ranks: effective rank of all tokens of each.
        reference: answers from all tokens, uncompressed.
        language: that answered.
    """

    images: Sequence[AskedImage]
    full_ranks: Sequence[float]
    reference: Answers
    language: LanguageModel
    _answers: list[pa.RecordBatch] = field(default_factory=list)
    _images: list[pa.RecordBatch] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Make the columns that all variants share."""
        asked = [
            (place, index, question)
            for place, image in enumerate(self.images)
            for index, question in enumerate(image.questions)
        ]
        keys = [image.sample.key for image in self.images]
        self._places = [place for place, _, _ in asked]
        self._questions = [question for _, _, question in asked]
        self._asked = {
            "key": pa.array([keys[place] for place in self._places], pa.string()),
            "prompt_index": pa.array([index for _, index, _ in asked], pa.int32()),
            "family": pa.array([question.family for question in self._questions], pa.string()),
        }
        self._of_images = {
            "key": pa.array(keys, pa.string()),
            "jpeg_bytes": pa.array([len(i.sample.image) for i in self.images], pa.int64()),
            "effective_rank_full": pa.array(self.full_ranks, pa.float64()),
        }
        self._log_full_QV = self.reference.logits.double().log_softmax(dim=1)
        self._full_correct = self._judge(self._texts(self.reference))

    def add(self, variant: Variant, answers: Answers, facts: ImageFacts) -> None:
        """Append the rows of one variant."""
        texts = self._texts(answers)
        columns = {
            **self._asked,
            **variant_columns(variant, len(texts)),
            "tokens": pa.array([facts.tokens[place] for place in self._places], pa.int32()),
            "bytes": pa.array([facts.num_bytes[place] for place in self._places], pa.int64()),
            "agrees": (answers.tokens == self.reference.tokens).all(dim=1).tolist(),
            "correct": pa.array(self._judge(texts), pa.bool_()),
            "full_correct": pa.array(self._full_correct, pa.bool_()),
            "kl": self._divergence(answers.logits).tolist(),
            "cosine": _cosine(self.reference.hidden, answers.hidden).tolist(),
            "answer": pa.array(texts, pa.string()),
        }
        self._answers.append(_batch(columns, ANSWERS))
        self._images.append(_batch(self._image_columns(variant, facts), IMAGES))

    def tables(self) -> tuple[pa.Table, pa.Table]:
        """Return the (answers, images) of the batch."""
        return (
            pa.Table.from_batches(self._answers, ANSWERS).combine_chunks(),
            pa.Table.from_batches(self._images, IMAGES).combine_chunks(),
        )

    def _image_columns(self, variant: Variant, facts: ImageFacts) -> dict[str, object]:
        num_images = len(self.images)
        overlaps = {
            f"overlap_{kind}": values + [None] * (num_images - len(values))
            for kind in DISTURBANCES
            for values in [list[float | None](facts.overlaps.get(kind, []))]
        }
        shown = [
            kept if image.number < POSITIONS_OF else None
            for image, kept in zip(self.images, facts.kept, strict=True)
        ]
        return {
            **self._of_images,
            **variant_columns(variant, num_images),
            **overlaps,
            "tokens": list(facts.tokens),
            "bytes": list(facts.num_bytes),
            "effective_rank": list(facts.effective_rank),
            "spectrum_share": list(facts.spectrum_share),
            "carve_s": list(facts.carve_s),
            "kept_positions": [None if kept is None else kept.positions.numpy() for kept in shown],
            "kept_sizes": [None if kept is None else kept.sizes.numpy() for kept in shown],
        }

    def _texts(self, answers: Answers) -> list[str]:
        return [self.language.text(tokens) for tokens in answers.tokens.tolist()]

    def _judge(self, texts: Sequence[str]) -> list[bool | None]:
        return [
            None if question.answer is None else is_right(text, question.answer)
            for text, question in zip(texts, self._questions, strict=True)
        ]

    def _divergence(self, logits_QV: Tensor) -> Tensor:
        """Return (Q,) KL of the full tokens' first answer token to this one's, in nats."""
        log_QV = logits_QV.double().log_softmax(dim=1)
        terms_QV = self._log_full_QV.exp() * (self._log_full_QV - log_QV)
        return terms_QV.sum(dim=1).clamp_min(0)


def _cosine(left_QD: Tensor, right_QD: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(left_QD.double(), right_QD.double(), dim=1)


def _batch(columns: dict[str, object], schema: pa.Schema) -> pa.RecordBatch:
    arrays = [
        column if isinstance(column, pa.Array) else pa.array(column, schema.field(name).type)
        for name, column in ((field.name, columns[field.name]) for field in schema)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)
