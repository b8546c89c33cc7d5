"""The page that `fidelity.py` writes: every figure comes from the tables of the run.

What stands between the two marks is written by hand, and a rerun keeps it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fidelity_groups import CALIBRATED, CODEC_BUDGET
from fidelity_online import CODEC
from fidelity_results import Results, is_online

from pipeline.evaluation.markdown import render_markdown, render_table
from pipeline.evaluation.means import (
    Estimate,
    carver_label,
    codec_label,
    share,
)
from pipeline.evaluation.page import render_page
from pipeline.evaluation.plots import pareto_front
from pipeline.evaluation.tables import Table, percent, whole
from pipeline.evaluation.variants import BASELINES, FULL, Variant

BEGIN, END = "<!-- by hand: begin -->", "<!-- by hand: end -->"
_UNWRITTEN = "Not written yet."

_MOST_LOST, _MOST_LOST_IN_A_FAMILY = 0.015, 0.03  # of the wish, against full tokens


def render(results: Results, facts: Mapping[str, Any], known: str) -> str:
    """Return the page as Markdown.

    Args:
        results: of all groups.
        facts: about the run.
        known: the page as it was, or "".
    """
    own = [
        *_standing(results),
        _against_pooling(results),
        _winners(results),
        *_codecs(results),
        _front(results),
        *_online(results),
    ]
    parts = [
        "# Fidelity: what carving costs",
        _intro(facts),
        "## What this means",
        f"{BEGIN}\n{by_hand(known)}\n{END}",
        "## In numbers",
        _sentences(results),
        "\n\n".join(render_table(table) for table in own),
        "## All carvers",
        f"At each budget all carvers, stored as {CODEC}, on the same questions.",
        render_markdown(results.compared).strip(),
        "## How it is measured",
        _method(facts),
    ]
    return "\n\n".join(parts) + "\n"


def render_plots(results: Results) -> str:
    """Return the plots as one HTML page."""
    return render_page(results.compared)


def by_hand(known: str) -> str:
    """Return what stands between the marks of a page."""
    _, begun, rest = known.partition(BEGIN)
    text, ended, _ = rest.partition(END)
    return text.strip() if begun and ended else _UNWRITTEN


def _intro(facts: Mapping[str, Any]) -> str:
    questions = ", ".join(f"{family} {count:,}" for family, count in facts["questions"].items())
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        "Written by this command; by hand only what stands under *What this means*:",
        "\n    python benchmarks/fidelity.py --work-dir DIR --write-page\n",
        f"- {facts['hardware']}",
        f"- {versions}",
        f"- {facts['date']}; weights `{facts['model'][:16]}`, of `benchmarks/yardstick/train.py`",
        f"- {facts['images']:,} pictures that training never saw (seed "
        f"`{facts['seeds']['pictures']}`), questions: {questions}",
        f"- every interval: 95 %, bootstrap over pictures, {facts['resamples']:,} resamples, seed "
        f"{facts['seeds']['bootstrap']}; every difference is paired",
    ]
    if facts["training"]:
        right = facts["training"]["heldout_accuracy"]
        said = ", ".join(f"{family} {value:.1%}" for family, value in right.items())
        lines.append(f"- the model's own accuracy when its training ended, held out: {said}")
    return "\n".join(lines)


def _at(results: Results, budget: float) -> list[Variant]:
    return results.compared.at_budget(budget)


def _base(results: Results, budget: float, name: str) -> Variant:
    return next(v for v in _at(results, budget) if v.carver == name)


def _reference(results: Results) -> Variant:
    found = results.compared.reference
    if found is None:
        raise ValueError("full tokens were not measured")
    return found


def _points(found: Estimate) -> str:
    return found.write("+.1f", factor=100)


def _surely(found: Estimate) -> int:
    """Return 1 or -1 where the interval says better or worse, else 0."""
    return int(found.floor > 0) - int(found.ceiling < 0)


def _standing(results: Results) -> Iterator[Table]:
    """Yield for each baseline who surely beats it and who surely loses to it."""
    for base in BASELINES:
        rows = []
        for budget in results.compared.budgets:
            other = _base(results, budget, base)
            signs = {
                carver_label(v): _surely(results.difference(v, other))
                for v in _at(results, budget)
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
        pooled = _base(results, budget, "average_pool")
        for variant in _at(results, budget):
            cells = found.setdefault(carver_label(variant), ["-"] * len(budgets))
            if variant != pooled:
                cells[place] = _points(results.difference(variant, pooled))
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
            found = {v: results.mean(v, "accuracy", family).mean for v in _at(results, budget)}
            best = max(found, key=lambda v: found[v])
            equal = sum(
                _surely(results.difference(v, best, family)) == 0 for v in found if v != best
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
                "-" if v == base else _points(results.difference(v, base)),
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
    reference = _reference(results)
    found = {f: results.difference(variant, reference, f) for f in results.sums.families}
    worst = min(found, key=lambda family: found[family].mean)
    return f"{worst} {_points(found[worst])}"


def _stored(results: Results) -> list[Variant]:
    return [v for v in results.places if not is_online(v)]


def _front(results: Results) -> Table:
    """Return what nothing beats at its size, with the JPEG files among it."""
    variants = _stored(results)
    places = [(results.mean(v, "bytes").mean, results.mean(v, "accuracy").mean) for v in variants]
    files = results.mean(variants[0], "jpeg_bytes").mean
    rows: list[tuple[float, list[str]]] = [(files, ["**the JPEG files**", "", "", "", ""])]
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
        _points(results.difference(variant, _reference(results))),
    ]


def _forms(results: Results, budget: float) -> list[Variant]:
    """Return the question-free forms of TokenCarve."""
    return [v for v in _at(results, budget) if v.carver in ("tokencarve", "tokencarve_floor")]


def _modes(results: Results, budget: float) -> list[Variant]:
    return [v for v in results.places if is_online(v) and v.budget == budget]


def _online(results: Results) -> Iterator[Table]:
    """Yield at each budget TokenCarve with the question, its controls, and without it."""
    for budget in results.compared.budgets:
        modes, forms = _modes(results, budget), _forms(results, budget)
        if not modes or not forms:
            continue
        published = next(v for v in modes if '"both"' in v.carver_options)
        bases = [_base(results, budget, name) for name in BASELINES]
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
                    "-" if v == published else _points(results.difference(v, published)),
                    whole(results.mean(v, "bytes")),
                ]
                for v in ranked
            ],
        )


def _short(found: Estimate) -> str:
    half = (found.ceiling - found.floor) / 2
    return f"{found.mean * 100:.1f} ± {half * 100:.1f}"


def _sentences(results: Results) -> str:
    lines = [_best_line(results, budget) for budget in results.compared.budgets]
    for budget in results.compared.budgets:
        lines += _online_lines(results, budget)
    lines.append(_read_line(results))
    lines.append(_wish_line(results))
    lines.append(_information_line(results))
    return "\n".join(f"- {line}" for line in lines if line)


def _best_line(results: Results, budget: float) -> str:
    at_budget, reference = _at(results, budget), _reference(results)
    best = at_budget[0]
    equal = [v for v in at_budget[1:] if _surely(results.difference(v, best)) == 0]
    beaten = {
        base: _surely(results.difference(best, _base(results, budget, base)))
        for base in BASELINES
        if best.carver != base
    }
    surely = [base for base, sign in beaten.items() if sign > 0]
    return (
        f"At {share(budget)} of the tokens `{carver_label(best)}` is best: "
        f"{_points(results.difference(best, reference))} points against full tokens "
        f"({percent(results.mean(reference, 'accuracy'))} %), surely above "
        f"{', '.join(surely) or 'no baseline'}. {len(equal)} others are not surely worse"
        + (f": {', '.join(f'`{carver_label(v)}`' for v in equal[:6])}" if equal else "")
        + (", ..." if len(equal) > 6 else ".")
    )


def _online_lines(results: Results, budget: float) -> Iterator[str]:
    modes = {v.carver_options.split('"')[3]: v for v in _modes(results, budget)}
    forms = _forms(results, budget)
    if not modes or not forms:
        return
    best, published = forms[0], modes["both"]
    norm = results.difference(published, modes["norm"])
    yield (
        f"At {share(budget)} TokenCarve's best question-free form, `{carver_label(best)}`, stands "
        f"{_points(results.difference(best, published))} points from the published online form; "
        f"its default stands {_points(results.difference(_default(forms), published))}. Online, "
        f"the information score is worth {_points(norm)} points over the plain norm."
    )


def _default(forms: Sequence[Variant]) -> Variant:
    return next(v for v in forms if (v.carver, v.carver_options) == ("tokencarve", "{}"))


def _read_line(results: Results) -> str:
    lost = []
    for read in (v for v in results.compared.variants if v.read < v.budget):
        carved = next(
            v
            for v in _at(results, read.read)
            if (v.carver, v.carver_options) == (read.carver, read.carver_options)
        )
        found = results.difference(read, carved)
        if _surely(found) < 0:
            lost.append(f"`{carver_label(read)}` read at {share(read.read)} ({_points(found)})")
    if not any(v.read < v.budget for v in results.compared.variants):
        return ""
    return (
        "Progressive reads, of what was carved at the largest budget, surely lose against carving "
        f"to what is read: {'; '.join(lost) or 'none of those measured'}."
    )


def _wish_line(results: Results) -> str:
    """Return which variants at the codecs' budget meet the wish of the project."""
    reference, met = _reference(results), []
    for variant in _stored(results):
        if abs(variant.budget - CODEC_BUDGET) > 1e-9 or variant.read != variant.budget:
            continue
        lost = -results.difference(variant, reference).mean
        families = [-results.difference(variant, reference, f).mean for f in results.sums.families]
        small = results.mean(variant, "bytes_per_jpeg").mean <= 1
        if small and lost <= _MOST_LOST and max(families) < _MOST_LOST_IN_A_FAMILY:
            met.append(f"`{carver_label(variant)}` as {codec_label(variant)}")
    return (
        f"At {share(CODEC_BUDGET)}: at most {_MOST_LOST * 100:.1f} points below full tokens in the "
        f"mean over families, below {_MOST_LOST_IN_A_FAMILY * 100:.0f} in the worst, and no more "
        f"bytes than the JPEG, by the means: {', '.join(met) or 'no variant that was measured'}."
    )


def _information_line(results: Results) -> str:
    rows = [r for r in results.compared.information["across"] if r["loss"] == "accuracy_lost"]
    said = [
        f"{row['information'].replace('_', ' ')} "
        f"{Estimate(mean=row['spearman'], low=row['low'], high=row['high']).write('.2f')}"
        for row in rows
    ]
    return (
        "Spearman's correlation of information kept and accuracy lost, over all variants of all "
        f"budgets: {'; '.join(said)}. At equal budget: {_within_budgets(results)}."
    )


def _within_budgets(results: Results) -> str:
    """Return the correlations over the carvers of one budget, where the budget cannot help."""
    said = []
    for budget in results.compared.budgets:
        found = results.correlation(_at(results, budget), "spectrum_share")
        said.append(f"{found.write('.2f')} at {share(budget)}")
    return "spectrum share " + ", ".join(said)


def _method(facts: Mapping[str, Any]) -> str:
    values = [
        f"`{entry.split()[0]}` {CALIBRATED[entry.split()[0]]} = "
        f"{', '.join(f'{value:.4g}' for value in found)}"
        for entry, found in facts["calibrated"].items()
        if entry.endswith(facts["model"])
    ]
    calibrated = (
        f"Calibrated as `carve calibrate` does, for each budget on {facts['sample_images']} other "
        f"pictures (seed `{facts['seeds']['calibration']}`): {'; '.join(values)}. "
        if values
        else ""
    )
    return (
        "Pictures are encoded once in each group, features behind the projector; each carver "
        "works at each budget, its tokens are packed, read back and handed to the model, which "
        f"answers greedily (`{facts['template']}`). An answer is right if it equals the only right "
        "one. Carvers have their default options unless named. Signals of the language model come "
        f"from the prompt `{facts['neutral_prompt']}`: no question is known. {calibrated}"
        "Carving times are those of one thread of a busy machine. Stability is that of the first "
        "64 pictures, which are scenes. One small model on drawn pictures: what wins here need not "
        "win on yours; `carve evaluate` tells."
    )
