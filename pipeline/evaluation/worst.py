"""Single answers that carving spoiled most, taken from the tables of an evaluation."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.evaluation.means import Means
from pipeline.evaluation.results import VARIANT_COLUMNS
from pipeline.evaluation.variants import Variant


@dataclass(frozen=True, kw_only=True, slots=True)
class WorstCase:
    """One question on one image, answered from carved tokens."""

    key: str
    prompt: str  # "" if not known
    family: str
    variant: Variant
    answer: str
    full_answer: str  # from all tokens, uncompressed
    kl: float  # nats
    positions: Sequence[int]  # of the kept tokens
    sizes: Sequence[float]  # source tokens that each stands for


def find_worst(
    means: Means,
    answers: pa.Table,
    images: pa.Table,
    *,
    keys: Collection[str],
    prompts: Mapping[tuple[str, int], str] | None = None,
    per_budget: int = 8,
) -> list[WorstCase]:
    """Return the worst answers at each budget: first wrong ones that full tokens got right.

    Among those, and then among the rest, by falling KL. No carver and no image occurs twice at one
    budget, so that the cases show what differs.

    Args:
        means: say which codec carvers are compared with; other variants are left out.
        answers: `answers.parquet`.
        images: `images.parquet`; only images with `kept_positions` can be shown.
        keys: of the images there are pictures of.
        prompts: by key and `prompt_index`.
        per_budget: at most so many cases at each budget.
    """
    kept = _kept(images, keys)
    reference = means.reference
    if not kept or reference is None:
        return []
    full = {
        (row["key"], row["prompt_index"]): row["answer"] for row in _rows(answers, reference, keys)
    }
    cases = []
    for budget in means.budgets:
        variants = means.at_budget(budget)
        rows = [
            (variant, row)
            for variant in variants
            for row in _rows(answers, variant, keys)
            if (row["key"], variant) in kept
        ]
        for variant, row in _spread(rows, per_budget):
            place = (row["key"], row["prompt_index"])
            positions, sizes = kept[row["key"], variant]
            cases.append(
                WorstCase(
                    key=row["key"],
                    prompt=(prompts or {}).get(place, ""),
                    family=row["family"],
                    variant=variant,
                    answer=row["answer"],
                    full_answer=full[place],
                    kl=row["kl"],
                    positions=positions,
                    sizes=sizes,
                )
            )
    return cases


def _spread(
    rows: Sequence[tuple[Variant, Mapping[str, Any]]], most: int
) -> Iterator[tuple[Variant, Mapping[str, Any]]]:
    """Yield the worst rows, no carver and no image twice."""
    seen: Counter[object] = Counter()
    found = 0
    for variant, row in sorted(rows, key=lambda item: _badness(item[1]), reverse=True):
        if found == most:
            return
        if seen[variant] or seen[row["key"]] or not _is_bad(row):
            continue
        seen.update([variant, row["key"]])
        found += 1
        yield variant, row


def _badness(row: Mapping[str, Any]) -> tuple[bool, float]:
    return (bool(row["full_correct"]) and row["correct"] is False, row["kl"])


def _is_bad(row: Mapping[str, Any]) -> bool:
    return not row["agrees"] or _badness(row)[0]


def _kept(
    images: pa.Table, keys: Collection[str]
) -> dict[tuple[str, Variant], tuple[list[int], list[float]]]:
    """Return positions and sizes of the kept tokens by key and variant."""
    table = images.filter(
        pc.and_(
            pc.is_in(images["key"], pa.array(sorted(keys), pa.string())),
            pc.is_valid(images["kept_positions"]),
        )
    )
    columns = ["key", *VARIANT_COLUMNS, "kept_positions", "kept_sizes"]
    return {
        (row["key"], Variant(**{name: row[name] for name in VARIANT_COLUMNS})): (
            row["kept_positions"],
            row["kept_sizes"],
        )
        for row in table.select(columns).to_pylist()
    }


def _rows(answers: pa.Table, variant: Variant, keys: Collection[str]) -> list[dict[str, Any]]:
    """Return the answers of one variant on some images."""
    chosen = pc.is_in(answers["key"], pa.array(sorted(keys), pa.string()))
    for name in VARIANT_COLUMNS:
        chosen = pc.and_(chosen, pc.equal(answers[name], getattr(variant, name)))
    return answers.filter(chosen).to_pylist()
