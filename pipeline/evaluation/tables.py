"""The tables of an evaluation, in words; `markdown.py` and `page.py` write them out."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from pipeline.evaluation.means import (
    Estimate,
    Means,
    carver_label,
    codec_label,
    is_baseline,
    share,
)
from pipeline.evaluation.variants import FULL, Variant

NONE = "-"
MEASURES = {
    "accuracy": "right answers, %",
    "agreement": "answers equal to those from full tokens, %",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """One table: the first column names its rows."""

    title: str
    note: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Column:
    """One number of a table."""

    head: str
    measure: str
    write: Callable[[Estimate], str]


def percent(estimate: Estimate) -> str:
    """Return a share and its interval in per cent."""
    return estimate.write(".1f", factor=100)


def number(estimate: Estimate) -> str:
    """Return a number and its interval."""
    return estimate.write(".4f")


def whole(estimate: Estimate) -> str:
    """Return a mean without its interval, as a whole number."""
    return f"{estimate.mean:,.0f}"


def result_tables(means: Means) -> list[Table]:
    """Return every table that there are numbers for."""
    return [
        *(_budget_table(means, budget) for budget in means.budgets),
        *_own_count_table(means),
        *_codec_table(means),
        *_read_table(means),
        *(_cost_table(means, budget) for budget in means.budgets),
        *_information_table(means),
    ]


def _budget_table(means: Means, budget: float) -> Table:
    return Table(
        title=f"{share(budget)} of the tokens",
        note=f"{MEASURES[means.measure]}, mean [95 % interval]; codec {means.codec[0]}. "
        "Baselines are marked *.",
        head=["carver", *means.columns, *_heads(_result_columns(means))],
        rows=[_result_row(means, v) for v in (*_full(means), *means.at_budget(budget))],
    )


def _own_count_table(means: Means) -> Iterator[Table]:
    found = means.at_budget(1.0)
    if found:
        yield Table(
            title="Carvers that decide their own count",
            note=f"{MEASURES[means.measure]}, mean [95 % interval]; codec {means.codec[0]}.",
            head=["carver", "tokens", *means.columns, *_heads(_result_columns(means))],
            rows=[
                [name, _text(means, variant, _TOKENS), *rest]
                for variant in found
                for name, *rest in [_result_row(means, variant)]
            ],
        )


def _codec_table(means: Means) -> Iterator[Table]:
    """Yield the carvings that were stored by several codecs, codec below codec."""
    cuts: dict[tuple[str, float], list[Variant]] = {}
    for variant in means.variants:
        if variant.read == variant.budget:
            cuts.setdefault((_title(variant), variant.budget), []).append(variant)
    stored = {cut: variants for cut, variants in cuts.items() if len(variants) > 1}
    if stored:
        yield Table(
            title="Codecs",
            note=f"{MEASURES[means.measure]}, mean [95 % interval].",
            head=["carver", "tokens", "codec", *means.columns, *_heads(_CHANGES)],
            rows=[
                [
                    name,
                    share(budget),
                    codec_label(variant),
                    *_family_cells(means, variant),
                    *(_text(means, variant, column) for column in _CHANGES),
                ]
                for (name, budget), variants in stored.items()
                for variant in means.ranked(variants)
            ],
        )


def _read_table(means: Means) -> Iterator[Table]:
    """Yield progressive reads beside carving to what was read."""
    reads = [v for v in means.variants if v.read < v.budget]
    if not reads:
        return
    known = set(means.variants)
    rows = []
    for v in sorted(reads, key=lambda v: (carver_label(v), codec_label(v), -v.read, v.budget)):
        carved = replace(v, budget=v.read)
        rows.append(
            [
                _title(v),
                codec_label(v),
                share(v.read),
                share(v.budget),
                _text(means, v, _main(means)),
                _text(means, carved, _main(means)) if carved in known else NONE,
                _text(means, v, _BYTES),
            ]
        )
    yield Table(
        title="Progressive reads",
        note="A prefix of what a larger budget stored, beside carving to that budget; "
        f"{MEASURES[means.measure]}, mean [95 % interval].",
        head=["carver", "codec", "read", "stored", "read, %", "carved, %", "bytes read"],
        rows=rows,
    )


def _cost_table(means: Means, budget: float) -> Table:
    columns = [
        column
        for column in _COSTS
        if any(means.get(v, column.measure) for v in means.at_budget(budget))
    ]
    return Table(
        title=f"Information kept, stability, bytes and time at {share(budget)}",
        note="Rank: effective rank of the kept tokens; spectrum: share of the Gram spectrum of "
        "all tokens that they hold; overlap: Jaccard index of the kept sets of an image and of "
        "its disturbed copy.",
        head=["carver", *_heads(columns)],
        rows=[
            [_title(v), *(_text(means, v, column) for column in columns)]
            for v in means.at_budget(budget)
        ],
    )


def _information_table(means: Means) -> Iterator[Table]:
    """Yield how well the information kept predicts what is lost."""
    rows = []
    for row in means.information["across"]:
        names = (row["information"], row["loss"])
        within = [r for r in means.information["within"] if (r["information"], r["loss"]) == names]
        found = Estimate(mean=row["spearman"], low=row["low"], high=row["high"])
        surely = sum(1 for r in within if r["high"] is not None and r["high"] < 0)
        rows.append(
            [_words(names[0]), _words(names[1]), found.write(".2f"), f"{surely} of {len(within)}"]
        )
    if rows:
        yield Table(
            title="Does the information kept predict what is lost?",
            note="Spearman's rank correlation of means over variants [95 % interval], negative "
            "where more information goes with less loss; and in how many variants the interval of "
            "the correlation over images lies below 0.",
            head=["information", "loss", "across variants", "below 0 within variants"],
            rows=rows,
        )


def _words(name: str) -> str:
    return name.replace("_", " ")


def _full(means: Means) -> list[Variant]:
    """Return full tokens: uncompressed, and with the codec that carvers are compared with."""
    reference = means.reference
    stored = [
        v
        for v in means.variants
        if v.carver == FULL and v != reference and (v.codec, v.codec_options) == means.codec
    ]
    return [*([reference] if reference else []), *stored]


def _result_row(means: Means, variant: Variant) -> list[str]:
    return [
        f"{_title(variant)}, {codec_label(variant)}" if variant.carver == FULL else _title(variant),
        *_family_cells(means, variant),
        *(_text(means, variant, column) for column in _result_columns(means)),
    ]


def _title(variant: Variant) -> str:
    if variant.carver == FULL:
        return "full tokens"
    return f"{carver_label(variant)}{' *' if is_baseline(variant) else ''}"


def _heads(columns: Sequence[_Column]) -> list[str]:
    return [column.head for column in columns]


def _family_cells(means: Means, variant: Variant) -> list[str]:
    column = _main(means)
    return [_text(means, variant, column, family) for family in means.columns]


def _result_columns(means: Means) -> list[_Column]:
    """Return what stands beside the families: what is lost is paired, question by question."""
    return [*([_LOST] if means.measure == "accuracy" else []), _KL, _BYTES]


def _main(means: Means) -> _Column:
    return _Column(head=f"{means.measure}, %", measure=means.measure, write=percent)


def _text(means: Means, variant: Variant, column: _Column, family: str = "") -> str:
    found = means.get(variant, column.measure, family)
    return NONE if found is None else column.write(found)


def _mean_percent(estimate: Estimate) -> str:
    return f"{estimate.mean * 100:.1f}"


def _points(estimate: Estimate) -> str:
    return estimate.write("+.1f", factor=100)


def _one_decimal(estimate: Estimate) -> str:
    return f"{estimate.mean:.1f}"


def _milliseconds(estimate: Estimate) -> str:
    return f"{estimate.mean * 1e3:.2f}"


_TOKENS = _Column(head="tokens", measure="tokens", write=_one_decimal)
_KL = _Column(head="KL, nats", measure="kl", write=number)
_BYTES = _Column(head="bytes per image", measure="bytes", write=whole)
_LOST = _Column(head="against full tokens, points", measure="accuracy_difference", write=_points)
_CHANGES = (
    _Column(head="equal answers, %", measure="agreement", write=percent),
    _KL,
    _Column(head="cosine", measure="cosine", write=number),
    _BYTES,
)
_COSTS = (
    _TOKENS,
    _BYTES,
    _Column(head="of the image file's, %", measure="bytes_per_jpeg", write=_mean_percent),
    _Column(head="rank", measure="effective_rank", write=_one_decimal),
    _Column(head="rank, % of all tokens'", measure="effective_rank_share", write=_mean_percent),
    _Column(head="spectrum, %", measure="spectrum_share", write=_mean_percent),
    _Column(head="overlap, JPEG q95, %", measure="overlap_jpeg", write=_mean_percent),
    _Column(head="overlap, 1-pixel shift, %", measure="overlap_shift", write=_mean_percent),
    _Column(head="overlap, noise 2/255, %", measure="overlap_noise", write=_mean_percent),
    _Column(head="carving, ms", measure="carve_s", write=_milliseconds),
)
