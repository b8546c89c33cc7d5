"""The tables of `fidelity.py`'s page that `carve evaluate` does not have."""

from collections.abc import Iterator
from dataclasses import replace

from fidelity_groups import CODEC_BUDGET, PLACEMENTS
from fidelity_online import CODEC
from fidelity_results import Results, is_online

from pipeline.evaluation.means import Estimate, carver_label, codec_label, share
from pipeline.evaluation.plots import pareto_front
from pipeline.evaluation.tables import Table, percent, whole
from pipeline.evaluation.variants import BASELINES, FULL, Variant


def own_tables(results: Results) -> list[Table]:
    """Return all of them."""
    return [
        *_standing(results),
        _against_pooling(results),
        _winners(results),
        _placements(results),
        *_codecs(results),
        _front(results),
        *_online(results),
    ]


def _standing(results: Results) -> Iterator[Table]:
    """Yield for each baseline who surely beats it and who surely loses to it."""
    for base in BASELINES:
        rows = []
        for budget in results.compared.budgets:
            other = baseline(results, budget, base)
            signs = {
                carver_label(v): surely(results.difference(v, other))
                for v in at_budget(results, budget)
                if v != other
            }
            better, worse = (
                [name for name, sign in signs.items() if sign == wanted] for wanted in (1, -1)
            )
            rows.append(
                [
                    share(budget),
                    percent(results.mean(other, "accuracy")),
                    f"{len(better)} of {len(signs)}",
                    ", ".join(worse) or "none",
                ]
            )
        yield Table(
            title=f"Against {base}",
            note="Carvers whose difference in accuracy, mean over families, has its whole interval "
            "above or below 0. The others cannot be told from it.",
            head=["tokens", f"{base}, %", "surely better", "surely worse, the best first"],
            rows=rows,
        )


def _against_pooling(results: Results) -> Table:
    budgets = results.compared.budgets
    found: dict[str, list[str]] = {}
    for place, budget in enumerate(budgets):
        pooled = baseline(results, budget, "average_pool")
        for variant in at_budget(results, budget):
            cells = found.setdefault(carver_label(variant), ["-"] * len(budgets))
            if variant != pooled:
                cells[place] = points(results.difference(variant, pooled))
    return Table(
        title="Difference to average pooling",
        note="Points of accuracy, mean over families [95 % interval], at equal share of tokens.",
        head=["carver", *(share(budget) for budget in budgets)],
        rows=[[name, *cells] for name, cells in found.items() if name != "average_pool"],
    )


def _winners(results: Results) -> Table:
    """Return who is best at what, and how many cannot be told from it."""
    families = results.compared.columns
    rows = []
    for budget in results.compared.budgets:
        row = [share(budget)]
        for family in families:
            found = {
                v: results.mean(v, "accuracy", family).mean for v in at_budget(results, budget)
            }
            best = max(found, key=lambda v: found[v])
            equal = sum(
                surely(results.difference(v, best, family)) == 0 for v in found if v != best
            )
            row.append(f"{carver_label(best)} {found[best] * 100:.1f} (+{equal})")
        rows.append(row)
    return Table(
        title="Who is best at what",
        note="The highest accuracy, %, and in brackets how many others are not surely worse. The "
        "best of many is partly luck: its number is a little too high.",
        head=["tokens", *families],
        rows=rows,
    )


def _placements(results: Results) -> Table:
    """Return what every carver comes to where its tokens stand elsewhere and count for more."""
    rows = []
    for variant in at_budget(results, CODEC_BUDGET):
        original, weighted = (placed(results, variant, name) for name in PLACEMENTS)
        if original is None or weighted is None:
            continue
        rows.append(
            [
                carver_label(variant),
                percent(results.mean(variant, "accuracy")),
                percent(results.mean(original, "accuracy")),
                percent(results.mean(weighted, "accuracy")),
                points(results.difference(weighted, variant)),
                points(results.difference(weighted, full_tokens(results))),
                _worst(results, weighted),
            ]
        )
    return Table(
        title=f"Where tokens stand and what they count for, at {share(CODEC_BUDGET)}",
        note="Accuracy, %, mean over families: tokens one behind the other (`packed`, as in every "
        "other table), at the positions they had (`original`), and there with each counting for "
        "as many as it stands for (`weighted`; the same as `original` where nothing is merged).",
        head=[
            *("carver", "packed", "original", "weighted"),
            *("weighted against packed, points", "weighted against full tokens", "worst family"),
        ],
        rows=rows,
    )


def placed(results: Results, variant: Variant, placement: str) -> Variant | None:
    """Return a variant in another placement; None if it was not measured."""
    found = replace(variant, placement=placement)
    return found if found in results.places else None


def _codecs(results: Results) -> Iterator[Table]:
    """Yield for full tokens and each carver what the codecs cost."""
    by_carver: dict[str, list[Variant]] = {}
    for variant in results.places:
        if is_online(variant) or variant.read != variant.budget:
            continue
        if variant.carver == FULL or abs(variant.budget - CODEC_BUDGET) < 1e-9:
            name = "full tokens" if variant.carver == FULL else carver_label(variant)
            by_carver.setdefault(name, []).append(variant)
    for name, variants in by_carver.items():
        if len(variants) < 3:  # stored by one codec only
            continue
        base = next(v for v in variants if v.codec == CODEC)
        rows = [
            [
                codec_label(v),
                f"{results.mean(v, 'bytes').mean:,.0f}",
                f"{results.mean(v, 'bytes_per_jpeg').mean * 100:.1f}",
                percent(results.mean(v, "accuracy")),
                "-" if v == base else points(results.difference(v, base)),
                _worst(results, v),
                percent(results.mean(v, "agreement")),
            ]
            for v in sorted(variants, key=lambda v: -results.mean(v, "bytes").mean)
        ]
        where = "" if name == "full tokens" else f" at {share(CODEC_BUDGET)}"
        yield Table(
            title=f"Codecs: {name}{where}",
            note=f"Bytes per picture and against its JPEG; accuracy, mean over families; the "
            f"difference to {CODEC}; the worst family against full tokens, uncompressed; answers "
            "equal to those from full tokens.",
            head=[
                *("codec", "bytes", "of the JPEG, %", "accuracy, %"),
                *(f"against {CODEC}, points", "worst family, points", "equal answers, %"),
            ],
            rows=rows,
        )


def _worst(results: Results, variant: Variant) -> str:
    reference = full_tokens(results)
    found = {f: results.difference(variant, reference, f) for f in results.sums.families}
    worst = min(found, key=lambda family: found[family].mean)
    return f"{worst} {points(found[worst])}"


def _front(results: Results) -> Table:
    """Return what nothing beats at its size, with the JPEG files among it."""
    variants = stored_variants(results)
    places = [(results.mean(v, "bytes").mean, results.mean(v, "accuracy").mean) for v in variants]
    files = results.mean(variants[0], "jpeg_bytes").mean
    rows: list[tuple[float, list[str]]] = [(files, ["the JPEG files", "", "", "", ""])]
    for index in pareto_front(places):
        variant = variants[index]
        rows.append((places[index][0], _front_row(results, variant)))
    return Table(
        title="Accuracy against bytes: the front",
        note="All carvers, budgets, codecs and reads that were measured; those that none beats at "
        "its size. Few carvers were stored by every codec. The best of many is partly luck.",
        head=["bytes per picture", "carver", "tokens", "codec", "accuracy, %", "against full"],
        rows=[[f"{size:,.0f}", *cells] for size, cells in sorted(rows, key=lambda row: row[0])],
    )


def _front_row(results: Results, variant: Variant) -> list[str]:
    part = "" if variant.read == variant.budget else f" of {share(variant.budget)}"
    return [
        "full tokens" if variant.carver == FULL else carver_label(variant),
        f"{share(variant.read)}{part}",
        codec_label(variant),
        percent(results.mean(variant, "accuracy")),
        points(results.difference(variant, full_tokens(results))),
    ]


def _online(results: Results) -> Iterator[Table]:
    """Yield at each budget TokenCarve with the question, its controls, and without it."""
    for budget in results.compared.budgets:
        modes, forms = online_modes(results, budget), question_free_forms(results, budget)
        if not modes or not forms:
            continue
        published = next(v for v in modes if '"both"' in v.carver_options)
        bases = [baseline(results, budget, name) for name in BASELINES]
        ranked = sorted([*modes, *forms, *bases], key=lambda v: -results.mean(v, "accuracy").mean)
        families = results.compared.columns
        yield Table(
            title=f"TokenCarve with and without the question at {share(budget)}",
            note="Accuracy, %; the difference to the published online form is paired. Online: "
            "carved after the second decoder layer, with the question; `norm` has the L2 norm in "
            "place of the information score. It needs all tokens to be stored and read.",
            head=["form", *families, "against online, both, points", "bytes read"],
            rows=[
                [
                    carver_label(v),
                    *(_short(results.mean(v, "accuracy", family)) for family in families),
                    "-" if v == published else points(results.difference(v, published)),
                    whole(results.mean(v, "bytes")),
                ]
                for v in ranked
            ],
        )


def _short(found: Estimate) -> str:
    half = (found.ceiling - found.floor) / 2
    return f"{found.mean * 100:.1f} ± {half * 100:.1f}"


def at_budget(results: Results, budget: float) -> list[Variant]:
    """Return the carvers at one budget, the best first."""
    return results.compared.at_budget(budget)


def baseline(results: Results, budget: float, name: str) -> Variant:
    """Return a baseline at one budget."""
    return next(v for v in at_budget(results, budget) if v.carver == name)


def full_tokens(results: Results) -> Variant:
    """Return full tokens, uncompressed."""
    found = results.compared.reference
    if found is None:
        raise ValueError("full tokens were not measured")
    return found


def points(found: Estimate) -> str:
    """Return a difference in points, with its interval."""
    return found.write("+.1f", factor=100)


def surely(found: Estimate) -> int:
    """Return 1 or -1 where the interval says better or worse, else 0."""
    return int(found.floor > 0) - int(found.ceiling < 0)


def stored_variants(results: Results) -> list[Variant]:
    """Return all variants but those of the online form."""
    return [v for v in results.places if not is_online(v)]


def question_free_forms(results: Results, budget: float) -> list[Variant]:
    """Return the question-free forms of TokenCarve."""
    return [v for v in at_budget(results, budget) if v.carver in ("tokencarve", "tokencarve_floor")]


def online_modes(results: Results, budget: float) -> list[Variant]:
    """Return the online form of TokenCarve and its controls."""
    return [v for v in results.places if is_online(v) and v.budget == budget]
