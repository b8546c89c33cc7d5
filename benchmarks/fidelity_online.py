"""The published online form of TokenCarve and its controls, measured as the stored variants are.

It is given full tokens as a cache would have stored them, and carves them after the second decoder
layer, with the question: its bytes are those of all tokens.

B images, Q questions on them, N tokens.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from pipeline import carvers, codecs
from pipeline.decode import decode_image
from pipeline.evaluation.answers import Answers
from pipeline.evaluation.images import AskedImage, Batches
from pipeline.evaluation.information import effective_ranks
from pipeline.evaluation.measure import load_language
from pipeline.evaluation.online_tokencarve import (
    ATTENTION_WEIGHTS,
    OnlineAnswers,
    OnlinePrompts,
    read_prompts,
)
from pipeline.evaluation.questions import fill_template
from pipeline.evaluation.records import POSITIONS_OF, BatchRecords, ImageFacts
from pipeline.evaluation.rows import read_back, store
from pipeline.evaluation.task import EvaluationTask
from pipeline.evaluation.variants import FULL, Variant, tokens_of
from pipeline.types import VisualTokens

CARVER = "online tokencarve"
BUDGETS = (1 / 3, 2 / 9, 1 / 9, 1 / 18)

CODEC = "fp16"
"""Of every comparison of carvers: it changes so little that only the carver counts."""


def online_variant(mode: str, budget: float) -> Variant:
    """Return the row of one mode and budget."""
    return Variant(
        carver=CARVER,
        carver_options=f'{{"mode": "{mode}"}}',
        budget=budget,
        read=budget,
        codec=CODEC,
        codec_options="{}",
        placement="original",
    )


class OnlineShare:
    """All of an evaluation in this process; stands in for `run.Share`.

    Args:
        task: what is asked, of which model.
    """

    num_variants = len(BUDGETS) * len(ATTENTION_WEIGHTS)

    def __init__(self, task: EvaluationTask) -> None:
        self.task = task
        self.rejected: Counter[str] = Counter()
        self.batches = Batches(
            source=task.source,
            questions=task.questions,
            batch_size=task.config.runner.batch_size,
        )

    def load(self) -> None:
        """Load encoder and language model."""
        task = self.task
        self.language = load_language(task)
        processor = self.language.processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        task.encoder.load(device="cpu", dtype=torch.float32, signals=frozenset())

    def tables(self) -> Iterator[tuple[pa.Table, pa.Table]]:
        """Yield the rows of each batch."""
        for batch in self.batches:
            yield self._measure(batch)

    def _measure(self, batch: Sequence[AskedImage]) -> tuple[pa.Table, pa.Table]:
        full = self._encode(batch)
        codec = codecs.build(CODEC)
        whole = [
            store(one, codec, num_source=len(features_ND))
            for features_ND in full
            for one in carvers.build(FULL).carve(
                VisualTokens(features=features_ND[None], grid=(1, len(features_ND)))
            )
        ]
        counts = [len(features_ND) for features_ND in full]
        stored = read_back(whole, codec, keep_tokens=counts, device="cpu", dtype=torch.float32)
        records = BatchRecords(
            # What is kept differs from question to question: no positions to show of an image.
            images=[_without_positions(image) for image in batch],
            full_ranks=effective_ranks(full),
            reference=self.language.ask(self.language.lay_out(_prompts(batch)), full),
            language=self.language,
        )
        prompts = self._read(batch, [image.features for image in stored])
        for budget in BUDGETS:
            keep = tokens_of(budget, counts[0])
            facts = ImageFacts(
                tokens=[keep] * len(batch),
                num_bytes=[row.bytes_read(n) for row, n in zip(whole, counts, strict=True)],
                effective_rank=[math.nan] * len(batch),
                spectrum_share=[math.nan] * len(batch),
                carve_s=[math.nan] * len(batch),
                overlaps={},
                kept=stored,
            )
            for mode in ATTENTION_WEIGHTS:
                found = prompts.answer(
                    keep_tokens=keep, mode=mode, max_new_tokens=self.language.max_new_tokens
                )
                records.add(online_variant(mode, budget), self._answers(found), facts)
        return records.tables()

    def _encode(self, batch: Sequence[AskedImage]) -> list[Tensor]:
        """Return the (N, D) full tokens of images of one size."""
        encoder = self.task.encoder
        pixels = [
            encoder.preprocess(
                decode_image(image.sample.image, key=image.sample.key, options=self.task.decode)
            )
            for image in batch
        ]
        (group,) = encoder.encode_pixels(pixels)
        return list(group.features)

    def _read(self, batch: Sequence[AskedImage], features: Sequence[Tensor]) -> OnlinePrompts:
        model: Any = self.language.model
        image_id = int(model.config.image_token_id)
        image_token = str(self.tokenizer.convert_ids_to_tokens(image_id))
        asked = [(place, q.prompt) for place, i in enumerate(batch) for q in i.questions]
        texts = fill_template(self.language.template, [prompt for _, prompt in asked], image_token)
        rows = []
        for (place, _), text in zip(asked, texts, strict=True):
            ids = self.tokenizer(text)["input_ids"]
            where = ids.index(image_id)
            rows.append([*ids[:where], *[image_id] * len(features[place]), *ids[where + 1 :]])
        longest = max(len(row) for row in rows)
        padded = [[image_id] * (longest - len(row)) + row for row in rows]  # masked: any id does
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        return read_prompts(
            model, torch.tensor(padded), torch.tensor(mask), [features[place] for place, _ in asked]
        )

    def _answers(self, found: OnlineAnswers) -> Answers:
        ends = self.language.model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        tokens = torch.full((len(found.tokens), self.language.max_new_tokens), -1)
        for row, said in zip(tokens, found.tokens, strict=True):
            kept = [token for token in said if token not in ends]
            row[: len(kept)] = torch.tensor(kept, dtype=torch.long)
        return Answers(
            tokens=tokens, logits=found.first_logits.float(), hidden=found.last_hidden.float()
        )


def _prompts(batch: Sequence[AskedImage]) -> list[list[str]]:
    return [[question.prompt for question in image.questions] for image in batch]


def _without_positions(image: AskedImage) -> AskedImage:
    return AskedImage(
        number=image.number + POSITIONS_OF, sample=image.sample, questions=image.questions
    )
