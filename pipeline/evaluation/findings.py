"""`summary.json`: what an evaluation came to, every number with its interval.

    variants      one object per (variant, family): the columns that name the variant, `family`
                  ("all": every question; "mean": mean over families, where there are several; else
                  one family), `images`, `questions`, and {mean, low, high, images} of
                  agreement, accuracy, full_accuracy, accuracy_difference (this - full, paired),
                  kl, cosine; where family is "all" also of tokens, bytes, jpeg_bytes,
                  bytes_per_jpeg (sum of bytes / sum of JPEG bytes), effective_rank,
                  effective_rank_share (of that of full tokens, image by image), spectrum_share,
                  carve_s, overlap_jpeg, overlap_shift, overlap_noise
    information   does the information kept predict what is lost? Spearman's correlations, negative
                  where less information goes with more loss: `within` each variant over images,
                  `across` variants over their means

Intervals: see `statistics`. What is not defined is left out: `accuracy` without answers, a
correlation with a constant; bounds are null where fewer than two images tell of a measure.

V variants, F families, I images.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.evaluation.results import VARIANT_COLUMNS
from pipeline.evaluation.statistics import Bootstrap, Floats, Interval, intervals, row_spearman

ALL, MEAN = "all", "mean"
"""Families of the rows over all questions, and of the mean over families."""

_ANSWER_METRICS = (
    "agreement",
    "accuracy",
    "full_accuracy",
    "accuracy_difference",
    "kl",
    "cosine",
)
_IMAGE_METRICS = (
    "tokens",
    "bytes",
    "jpeg_bytes",
    "effective_rank",
    "spectrum_share",
    "carve_s",
    "overlap_jpeg",
    "overlap_shift",
    "overlap_noise",
)
_INFORMATION = ("spectrum_share", "effective_rank_share")
_LOSSES = ("disagreement", "accuracy_lost", "kl")

Codes = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Sums:
    """Sums and counts of each metric, image by image. Made by `sum_up` and `join`."""

    keys: Sequence[str]  # of the images, in the order of the input
    variants: Sequence[Mapping[str, Any]]
    families: Sequence[str]  # sorted
    answers: Mapping[str, tuple[Floats, Floats]]  # (V, F, I) sums and counts
    images: Mapping[str, tuple[Floats, Floats]]  # (V, I) likewise


def summarize(answers: pa.Table, images: pa.Table, *, resamples: int, seed: int) -> dict[str, Any]:
    """Return the means of an evaluation with their intervals.

    Args:
        answers: of `results.ANSWERS`.
        images: of `results.IMAGES`.
        resamples: of the bootstrap over images.
        seed: of the bootstrap.
    """
    return describe(sum_up(answers, images), resamples=resamples, seed=seed)


def describe(sums: Sums, *, resamples: int, seed: int) -> dict[str, Any]:
    """Return the means of what was summed up, with their intervals; arguments as for `summarize`.

    The same images, resamples and seed give the same resamples: results of several calls are
    paired.
    """
    num_images = len(sums.keys)
    bootstrap = Bootstrap(num_images=num_images, resamples=resamples, seed=seed)
    return {
        "images": num_images,
        "questions": int(sums.answers["agreement"][1][0].sum()),
        "families": list(sums.families),
        "variants": list(_rows(sums, bootstrap)),
        "information": {
            "within": list(_within(sums, bootstrap)),
            "across": list(_across(sums, bootstrap)),
        },
    }


def join(parts: Sequence[Sums]) -> Sums:
    """Return the variants of several evaluations of the same questions, in order, each once.

    Raises:
        ValueError: they are not of the same images and families.
    """
    first = parts[0]
    for part in parts[1:]:
        if (list(part.keys), list(part.families)) != (list(first.keys), list(first.families)):
            raise ValueError("evaluations of different images or families cannot be joined")
    chosen: dict[tuple[Any, ...], tuple[Mapping[str, Any], Sums, int]] = {}
    for part in parts:
        for v, variant in enumerate(part.variants):
            chosen.setdefault(tuple(variant.values()), (variant, part, v))
    rows = list(chosen.values())

    def stacked(kind: str) -> dict[str, tuple[Floats, Floats]]:
        cells = [(getattr(part, kind), v) for _, part, v in rows]
        return {
            name: (
                np.stack([metrics[name][0][v] for metrics, v in cells]),
                np.stack([metrics[name][1][v] for metrics, v in cells]),
            )
            for name in getattr(first, kind)
        }

    return Sums(
        keys=first.keys,
        variants=[variant for variant, _, _ in rows],
        families=first.families,
        answers=stacked("answers"),
        images=stacked("images"),
    )


def sum_up(answers: pa.Table, images: pa.Table) -> Sums:
    """Return sums and counts of each metric by variant, family and image; as for `summarize`."""
    variant_of_image, names = _variant_codes(images)
    variant_of_answer, names_of_answers = _variant_codes(answers)
    number = {tuple(name.values()): code for code, name in enumerate(names)}
    variant_of_answer = np.array([number[tuple(n.values())] for n in names_of_answers])[
        variant_of_answer
    ]
    keys = pc.unique(images["key"])
    image_of_image = pc.index_in(images["key"], keys).to_numpy()
    image_of_answer = pc.index_in(answers["key"], keys).to_numpy()
    families = sorted(pc.unique(answers["family"]).to_pylist())
    family = pc.index_in(answers["family"], pa.array(families, pa.string())).to_numpy()
    shape = (len(names), len(families), len(keys))
    cell = (variant_of_answer * shape[1] + family) * shape[2] + image_of_answer
    image_cell = variant_of_image * shape[2] + image_of_image
    return Sums(
        keys=keys.to_pylist(),
        variants=names,
        families=families,
        answers={
            name: _cells(values, cell, shape) for name, values in _answer_values(answers).items()
        },
        images={
            name: _cells(values, image_cell, (shape[0], shape[2]))
            for name, values in _image_values(images).items()
        },
    )


def _variant_codes(table: pa.Table) -> tuple[Codes, list[dict[str, Any]]]:
    """Return the variant of each row as a number, and what the numbers stand for, in order."""
    codes = np.zeros(len(table), dtype=np.int64)
    for name in VARIANT_COLUMNS:
        values = pc.unique(table[name])
        codes = codes * len(values) + pc.index_in(table[name], values).to_numpy()
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    order = np.argsort(first)
    names = table.select(VARIANT_COLUMNS).take(pa.array(first[order])).to_pylist()
    return np.argsort(order)[inverse], names


def _answer_values(answers: pa.Table) -> dict[str, Floats]:
    correct, full = _floats(answers["correct"]), _floats(answers["full_correct"])
    return {
        "agreement": _floats(answers["agrees"]),
        "accuracy": correct,
        "full_accuracy": full,
        "accuracy_difference": correct - full,
        "kl": _floats(answers["kl"]),
        "cosine": _floats(answers["cosine"]),
    }


def _image_values(images: pa.Table) -> dict[str, Floats]:
    values = {name: _floats(images[name]) for name in _IMAGE_METRICS}
    values["effective_rank_share"] = values["effective_rank"] / _floats(
        images["effective_rank_full"]
    )
    return values


def _floats(column: pa.ChunkedArray) -> Floats:
    """Return a column of numbers or truth values as floats, NaN for null."""
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    values: Floats = column.cast(pa.float64()).to_numpy()
    return values


def _cells(values: Floats, cell: Codes, shape: tuple[int, ...]) -> tuple[Floats, Floats]:
    size = int(np.prod(shape))
    known = np.isfinite(values)
    sums = np.bincount(cell[known], weights=values[known], minlength=size).astype(float)
    counts = np.bincount(cell[known], minlength=size).astype(float)
    return sums.reshape(shape), counts.reshape(shape)


def _rows(sums: Sums, bootstrap: Bootstrap) -> Iterator[dict[str, Any]]:
    for v, variant in enumerate(sums.variants):
        sums_IFC, counts_IFC = _of_variant(sums, v)
        whole = _answer_row(sums_IFC.sum(axis=1), counts_IFC.sum(axis=1), bootstrap)
        yield {**variant, "family": ALL, **whole, **_image_measures(sums, v, bootstrap)}
        if len(sums.families) < 2:
            continue
        means = _measures(_ANSWER_METRICS, bootstrap.family_means(sums_IFC, counts_IFC))
        yield {**variant, "family": MEAN, **_counts(counts_IFC.sum(axis=1)), **means}
        for f, family in enumerate(sums.families):
            row = _answer_row(sums_IFC[:, f], counts_IFC[:, f], bootstrap)
            yield {**variant, "family": family, **row}


def _of_variant(sums: Sums, v: int) -> tuple[Floats, Floats]:
    """Return (I, F, C) sums and counts of what the answers of one variant say."""
    values = [sums.answers[name] for name in _ANSWER_METRICS]
    return (
        np.stack([sums_VFI[v].T for sums_VFI, _ in values], axis=2),
        np.stack([counts_VFI[v].T for _, counts_VFI in values], axis=2),
    )


def _answer_row(sums_IC: Floats, counts_IC: Floats, bootstrap: Bootstrap) -> dict[str, Any]:
    found = _measures(_ANSWER_METRICS, bootstrap.means(sums_IC, counts_IC))
    return {**_counts(counts_IC), **found}


def _counts(counts_IC: Floats) -> dict[str, int]:
    return {"images": int((counts_IC[:, 0] > 0).sum()), "questions": int(counts_IC[:, 0].sum())}


def _image_measures(sums: Sums, v: int, bootstrap: Bootstrap) -> dict[str, Any]:
    names = (*_IMAGE_METRICS, "effective_rank_share")
    values = [(sums.images[name][0][v], sums.images[name][1][v]) for name in names]
    # A ratio of sums: what a corpus takes as tokens, per byte that it takes as images.
    values.append((sums.images["bytes"][0][v], sums.images["jpeg_bytes"][0][v]))
    sums_IC, counts_IC = (np.stack(part, axis=1) for part in zip(*values, strict=True))
    return _measures((*names, "bytes_per_jpeg"), bootstrap.means(sums_IC, counts_IC))


def _measures(names: Sequence[str], found: Sequence[Interval]) -> dict[str, Any]:
    """Return intervals by name, without those that are not defined."""
    pairs = zip(names, found, strict=True)
    return {name: asdict(value) for name, value in pairs if np.isfinite(value.mean)}


def _losses(sums: Sums) -> dict[str, tuple[Floats, Floats]]:
    """Return (V, I) sums and counts of what is lost; more is worse."""
    of = {name: (s.sum(axis=1), c.sum(axis=1)) for name, (s, c) in sums.answers.items()}
    agreed, asked = of["agreement"]
    lost, judged = of["accuracy_difference"]
    return {
        "disagreement": (asked - agreed, asked),
        "accuracy_lost": (-lost, judged),
        "kl": of["kl"],
    }


def _means(sums: Floats, counts: Floats) -> Floats:
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def _within(sums: Sums, bootstrap: Bootstrap) -> Iterator[dict[str, Any]]:
    """Yield for each variant how information kept and loss go together from image to image."""
    losses = _losses(sums)
    for v, variant in enumerate(sums.variants):
        for information in _INFORMATION:
            kept_I = _means(*(part[v] for part in sums.images[information]))
            for loss in _LOSSES:
                lost_I = _means(*(part[v] for part in losses[loss]))
                found = bootstrap.spearman(kept_I, lost_I)
                if np.isfinite(found.mean):
                    yield {**variant, "information": information, "loss": loss, **_named(found)}


def _across(sums: Sums, bootstrap: Bootstrap) -> Iterator[dict[str, Any]]:
    """Yield how mean information kept and mean loss go together from variant to variant."""
    losses = _losses(sums)
    for information in _INFORMATION:
        kept_C, kept_RC = _with_resamples(*sums.images[information], bootstrap)
        for loss in _LOSSES:
            lost_C, lost_RC = _with_resamples(*losses[loss], bootstrap)
            value = row_spearman(kept_C[None], lost_C[None])
            samples_R1 = row_spearman(kept_RC, lost_RC)[:, None]
            images = np.array([bootstrap.num_images])
            (found,) = intervals(value, samples_R1, images)
            if np.isfinite(found.mean):
                named = {"information": information, "loss": loss, **_named(found)}
                yield {**named, "variants": len(sums.variants)}


def _with_resamples(
    sums_VI: Floats, counts_VI: Floats, bootstrap: Bootstrap
) -> tuple[Floats, Floats]:
    means_V = _means(sums_VI.sum(axis=1), counts_VI.sum(axis=1))
    return means_V, bootstrap.ratios(sums_VI.T, counts_VI.T)


def _named(found: Interval) -> dict[str, Any]:
    values = asdict(found)
    return {"spearman": values.pop("mean"), **values}
