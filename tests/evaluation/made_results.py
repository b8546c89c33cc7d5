"""Results of an evaluation that was never made: tables of drawn numbers and their summary."""

import itertools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.evaluation.findings import summarize
from pipeline.evaluation.results import ANSWERS, IMAGES, read_summary, write_summary
from pipeline.evaluation.variants import Variant

FAMILIES = ("read", "attribute", "count")
BUDGETS = (1 / 3, 2 / 9, 1 / 9)
KEYS = tuple("abcdefghijkl")
FULL = Variant(
    carver="identity", carver_options="{}", budget=1.0, read=1.0, codec="fp32", codec_options="{}"
)


def variant(
    carver: str,
    budget: float,
    *,
    read: float | None = None,
    codec: str = "int8",
    options: dict[str, Any] | None = None,
) -> Variant:
    return Variant(
        carver=carver,
        carver_options=json.dumps(options or {}, sort_keys=True),
        budget=budget,
        read=budget if read is None else read,
        codec=codec,
        codec_options="{}",
    )


def made_variants(carvers: Sequence[str], budgets: Sequence[float] = BUDGETS) -> list[Variant]:
    """Return full tokens, carvers by budgets, codecs and reads of the first, and an own count."""
    first = carvers[0]
    return [
        FULL,
        variant("identity", 1.0),
        *(variant(carver, budget) for carver in carvers for budget in budgets),
        *(variant(first, budgets[1], codec=codec) for codec in ("int4", "fp16")),
        *(variant(first, budgets[0], read=read) for read in budgets[1:]),
        variant("prumerge_plus", 1.0),
    ]


def made_answers(
    variants: Sequence[Variant],
    *,
    keys: Sequence[str] = KEYS,
    families: Sequence[str] = FAMILIES,
    judged: bool = True,
) -> pa.Table:
    """Return a question of each family on every image; full tokens are wrong on the first one."""
    generator = np.random.default_rng(0)
    skill = {v.carver: generator.uniform(0.6, 0.95) for v in variants}
    rows = []
    for v in variants:
        chance = 1.0 if v.carver == "identity" else skill[v.carver] * v.read**0.1
        for key, (prompt, family) in itertools.product(keys, enumerate(families or [""])):
            full_correct = (key, prompt) != (keys[0], 0)
            agrees = v == FULL or bool(generator.uniform() < chance)
            rows.append(
                {
                    **asdict(v),
                    "key": key,
                    "prompt_index": prompt,
                    "family": family,
                    "tokens": round(576 * v.read),
                    "bytes": num_bytes(v),
                    "agrees": agrees,
                    "correct": (agrees and full_correct) if judged else None,
                    "full_correct": full_correct if judged else None,
                    "kl": 0.0 if v == FULL else float(generator.exponential(0.1)),
                    "cosine": float(generator.uniform(0.8, 1.0)),
                    "answer": f"{key}-{prompt}" if agrees else "something <else>",
                }
            )
    return pa.Table.from_pylist(rows, schema=ANSWERS)


def made_images(
    variants: Sequence[Variant], *, keys: Sequence[str] = KEYS, num_tokens: int = 16
) -> pa.Table:
    """Return the kept positions of every image but the last; noise was never measured."""
    generator = np.random.default_rng(1)
    rows = [
        {
            **asdict(v),
            "key": key,
            "tokens": round(576 * v.read),
            "bytes": num_bytes(v),
            "jpeg_bytes": 30_000 + 1000 * place,
            "effective_rank": 60 * v.read + float(generator.uniform()),
            "effective_rank_full": 62.0,
            "spectrum_share": v.read**0.5 * float(generator.uniform(0.9, 1.0)),
            "carve_s": 0.003 + 0.0001 * place,
            "overlap_jpeg": float(generator.uniform(0.7, 1.0)),
            "overlap_shift": float(generator.uniform(0.5, 1.0)),
            "overlap_noise": None,
            "kept_positions": None
            if key == keys[-1]
            else list(range(max(1, round(num_tokens * v.read)))),
            "kept_sizes": None if key == keys[-1] else [1.0] * max(1, round(num_tokens * v.read)),
        }
        for v in variants
        for place, key in enumerate(keys)
    ]
    return pa.Table.from_pylist(rows, schema=IMAGES)


def made_summary(
    variants: Sequence[Variant], *, families: Sequence[str] = FAMILIES, judged: bool = True
) -> dict[str, Any]:
    """Return the content of the `summary.json` of these tables."""
    answers = made_answers(variants, families=families, judged=judged)
    content = summarize(answers, made_images(variants), resamples=100, seed=0)
    with tempfile.TemporaryDirectory() as folder:
        write_summary(folder, content)
        return read_summary(folder)


def num_bytes(v: Variant) -> int:
    return round(576 * v.read * {"fp32": 1024, "fp16": 520, "int8": 268, "int4": 140}[v.codec])
