"""Train projector and language model on features that carvecache stored of the frozen tower.

First the projector learns to put each patch near the words for what it shows, as the captions of
LLaVA's first stage have it do; without that, looking things up in the image is learnt hours later.
Then all of it learns from questions.

Several questions about one image stand in one sequence, each with its answer: one step then learns
from all of them and pays for the image tokens once. The loss counts answers and their ends only.
P image tokens, T text tokens.
"""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from checkpoint import BOS, EOS, PAD
from steps import Plan, run_steps
from targets import HEADS, patch_words
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from tower import patch_loss

from pipeline import open_cache
from pipeline.dataset import CarvedDataset
from pipeline.demo.quiz import FAMILIES

PER_FAMILY: Mapping[str, int] = {
    "read": 4,
    "attribute": 3,
    "count": 3,
    "relation": 3,
    "page": 6,
}
"""Questions asked of an image in one step, at most."""

_WORDS_TO_REST = 10.0  # weight of the words' loss, a mean over the vocabulary
_WORD_WEIGHT = 5.0  # of a word that is true of a patch: few are
_IGNORED = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One question in tokens."""

    family: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]  # with the end token


@dataclass(frozen=True, kw_only=True, slots=True)
class Lessons:
    """All images of a cache."""

    features: Tensor  # (M, P, D) bfloat16, of the tower
    questions: Sequence[Sequence[Asked]]


def align_projector(
    model: Any,  # noqa: ANN401
    features_MPD: Tensor,
    patches_MPH: Tensor,
    vocabulary: Mapping[str, int],
    plan: Plan,
) -> Iterator[str]:
    """Train projector and word embeddings until patches are near their words; yield a log.

    A linear layer, thrown away afterwards, holds the projector to what words do not say, such as
    the row and the place in a word.

    Args:
        model: a LLaVA.
        features_MPD: of the tower.
        patches_MPH: what each patch shows, in the order of the features.
        vocabulary: word -> id.
        plan: how long.
    """
    embeddings = model.model.language_model.embed_tokens
    projector = model.model.multi_modal_projector
    rest = nn.Linear(embeddings.embedding_dim, sum(HEADS.values()))
    bias = nn.ParameterList([torch.full((embeddings.num_embeddings,), -4.0)])

    def loss_of(_: int, chosen: Tensor) -> Tensor:
        words_BPV = torch.from_numpy(patch_words(patches_MPH[chosen].numpy(), vocabulary))
        projected_BPD = projector(features_MPD[chosen].float())
        loss = F.binary_cross_entropy_with_logits(
            projected_BPD @ embeddings.weight.T + bias[0],
            words_BPV.float(),
            pos_weight=torch.tensor(_WORD_WEIGHT),
        )
        return _WORDS_TO_REST * loss + patch_loss(rest(projected_BPD), patches_MPH[chosen])

    modules = [projector, embeddings, rest, bias]
    yield from run_steps(modules, plan, num_images=len(features_MPD), loss_of=loss_of)


def load_lessons(url: str, tokenizer: Any) -> Lessons:  # noqa: ANN401
    """Read a whole cache, in the order of its keys."""
    dataset = CarvedDataset(open_cache(url), columns=["json"])
    features, questions = {}, {}
    rows: list = []
    for row in dataset:
        rows.append(row)
        if len(rows) == 256:
            _take(dataset, rows, features, questions, tokenizer)
            rows = []
    if rows:
        _take(dataset, rows, features, questions, tokenizer)
    keys = sorted(features)
    return Lessons(
        features=torch.stack([features[key] for key in keys]),
        questions=[questions[key] for key in keys],
    )


def train_language(
    model: Any,  # noqa: ANN401
    lessons: Lessons,
    *,
    plan: Plan,
    state_path: Path,
    per_family: Mapping[str, int] = PER_FAMILY,
) -> Iterator[str]:
    """Train the projector and the language model of a LLaVA, whose head is its word embeddings.

    Yields lines of a log with the share of right answers since the last. See `run_steps`.
    """
    right = dict.fromkeys(FAMILIES, (0, 0))

    def loss_of(step: int, chosen: Tensor) -> Tensor:
        rng = random.Random(step)
        asked = [_sample(lessons.questions[i], per_family, rng) for i in chosen.tolist()]
        loss, found = _loss(model, lessons.features[chosen], asked)
        _count(right, found)
        return loss

    modules = [model.model.multi_modal_projector, model.model.language_model]
    num_images = len(lessons.questions)
    for line in run_steps(
        modules, plan, num_images=num_images, loss_of=loss_of, state_path=state_path
    ):
        yield f"{line}, { ({family: round(value, 3) for family, value in _shares(right).items()}) }"
        right.update(dict.fromkeys(FAMILIES, (0, 0)))


def measure_answers(model: Any, lessons: Lessons) -> dict[str, float]:  # noqa: ANN401
    """Return the share of questions of each family answered right, each asked alone."""
    right = dict.fromkeys(FAMILIES, (0, 0))
    with torch.inference_mode():
        for index, questions in enumerate(lessons.questions):
            features = lessons.features[index].expand(len(questions), -1, -1)
            _, found = _loss(model, features, [[question] for question in questions])
            _count(right, found)
    return _shares(right)


def _count(right: dict[str, tuple[int, int]], found: Mapping[str, tuple[int, int]]) -> None:
    """Add right and asked questions by family to those counted before."""
    for family, (good, total) in found.items():
        right[family] = (right[family][0] + good, right[family][1] + total)


def _shares(right: Mapping[str, tuple[int, int]]) -> dict[str, float]:
    return {family: good / max(total, 1) for family, (good, total) in right.items()}


def _take(dataset, rows, features, questions, tokenizer) -> None:  # noqa: ANN001
    batch = dataset.collate(rows)
    padded = batch.padded(dtype=torch.bfloat16)
    for place, key in enumerate(batch.keys):
        features[key] = padded.features[place].clone()
        asked = json.loads(batch.columns["json"][place])["questions"]
        questions[key] = [_tokenize(question, tokenizer) for question in asked]


def _tokenize(question: Mapping[str, str], tokenizer: Any) -> Asked:  # noqa: ANN401
    words = tokenizer.convert_tokens_to_ids(question["prompt"].split())
    answer = tokenizer.convert_tokens_to_ids(question["answer"].split())
    return Asked(family=question["family"], prompt=tuple(words), answer=(*answer, EOS))


def _sample(
    questions: Sequence[Asked], per_family: Mapping[str, int], rng: random.Random
) -> list[Asked]:
    chosen = []
    for family in FAMILIES:
        of_family = [question for question in questions if question.family == family]
        chosen += rng.sample(of_family, min(len(of_family), per_family[family]))
    rng.shuffle(chosen)
    return chosen


def _loss(
    model: Any,  # noqa: ANN401
    features_BPD: Tensor,
    asked: Sequence[Sequence[Asked]],
) -> tuple[Tensor, dict[str, tuple[int, int]]]:
    """Return the mean loss of a token of an answer, and right and asked questions by family."""
    ids_BT, labels_BT = _sequences(asked)
    language = model.model.language_model
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image = model.model.multi_modal_projector(features_BPD)
        text = language.embed_tokens(ids_BT)
        begin = language.embed_tokens(torch.full((len(ids_BT), 1), BOS))
        hidden = language(
            inputs_embeds=torch.cat([begin.to(image.dtype), image, text.to(image.dtype)], 1),
            use_cache=False,
        ).last_hidden_state
        # The last image token and every text token but the last say the text that follows.
        logits_BTV = model.lm_head(hidden[:, features_BPD.shape[1] : -1])
    wanted = labels_BT.flatten()
    loss = F.cross_entropy(logits_BTV.flatten(0, 1).float(), wanted, ignore_index=_IGNORED)
    return loss, _count_right(logits_BTV.argmax(-1), labels_BT, asked)


def _sequences(asked: Sequence[Sequence[Asked]]) -> tuple[Tensor, Tensor]:
    """Return text tokens and labels (B, T), padded on the right."""
    ids = [[t for q in questions for t in (*q.prompt, *q.answer)] for questions in asked]
    labels = [
        [t for q in questions for t in (*[_IGNORED] * len(q.prompt), *q.answer)]
        for questions in asked
    ]
    length = max(len(row) for row in ids)
    return (
        torch.tensor([row + [PAD] * (length - len(row)) for row in ids]),
        torch.tensor([row + [_IGNORED] * (length - len(row)) for row in labels]),
    )


def _count_right(
    said_BT: Tensor, labels_BT: Tensor, asked: Sequence[Sequence[Asked]]
) -> dict[str, tuple[int, int]]:
    """Count answers whose every token is the likeliest: those that greedy decoding would give."""
    fits_BT = ((said_BT == labels_BT) | (labels_BT == _IGNORED)).numpy()
    counts = dict.fromkeys(FAMILIES, (0, 0))
    for row, questions in zip(fits_BT, asked, strict=True):
        start = 0
        for question in questions:
            end = start + len(question.prompt) + len(question.answer)
            good, total = counts[question.family]
            counts[question.family] = (good + bool(row[start:end].all()), total + 1)
            start = end
    return counts
