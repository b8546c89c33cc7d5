"""What the tables of `fidelity.py` say, in sentences made from their numbers."""

from collections.abc import Iterator, Sequence

from fidelity_groups import CODEC_BUDGET, PLACEMENTS
from fidelity_results import Results
from fidelity_tables import (
    at_budget,
    baseline,
    full_tokens,
    online_modes,
    placed,
    points,
    question_free_forms,
    stored_variants,
    surely,
)

from pipeline.evaluation.means import Estimate, carver_label, codec_label, share
from pipeline.evaluation.tables import percent
from pipeline.evaluation.variants import BASELINES, Variant

_MOST_LOST, _MOST_LOST_IN_A_FAMILY = 0.015, 0.03  # of the wish, against full tokens


def sentences(results: Results) -> str:
    """Return them as a Markdown list."""
    lines = [_best_line(results, budget) for budget in results.compared.budgets]
    for budget in results.compared.budgets:
        lines += _online_lines(results, budget)
    lines.append(_placement_line(results))
    lines.append(_read_line(results))
    lines.append(_wish_line(results))
    lines.append(_information_line(results))
    return "\n".join(f"- {line}" for line in lines if line)


def _best_line(results: Results, budget: float) -> str:
    ranked, reference = at_budget(results, budget), full_tokens(results)
    best = ranked[0]
    equal = [v for v in ranked[1:] if surely(results.difference(v, best)) == 0]
    beaten = {
        base: surely(results.difference(best, baseline(results, budget, base)))
        for base in BASELINES
        if best.carver != base
    }
    above = [base for base, sign in beaten.items() if sign > 0]
    return (
        f"At {share(budget)} of the tokens `{carver_label(best)}` is best: "
        f"{points(results.difference(best, reference))} points against full tokens "
        f"({percent(results.mean(reference, 'accuracy'))} %), surely above "
        f"{', '.join(above) or 'no baseline'}. {len(equal)} others are not surely worse"
        + (f": {', '.join(f'`{carver_label(v)}`' for v in equal[:6])}" if equal else "")
        + (", ..." if len(equal) > 6 else ".")
    )


def _online_lines(results: Results, budget: float) -> Iterator[str]:
    modes = {v.carver_options.split('"')[3]: v for v in online_modes(results, budget)}
    forms = question_free_forms(results, budget)
    if not modes or not forms:
        return
    best, published = forms[0], modes["both"]
    norm = results.difference(published, modes["norm"])
    yield (
        f"At {share(budget)} TokenCarve's best question-free form, `{carver_label(best)}`, stands "
        f"{points(results.difference(best, published))} points from the published online form; "
        f"its default stands {points(results.difference(_default(forms), published))}. Online, "
        f"the information score is worth {points(norm)} points over the plain norm."
    )


def _default(forms: Sequence[Variant]) -> Variant:
    return next(v for v in forms if (v.carver, v.carver_options) == ("tokencarve", "{}"))


def _placement_line(results: Results) -> str:
    """Return how much places and weights are worth, and who is best with them."""
    ranked = at_budget(results, CODEC_BUDGET)
    found = {}
    for name in PLACEMENTS:
        pairs = [(v, other) for v in ranked if (other := placed(results, v, name)) is not None]
        if not pairs:
            return ""
        better = sum(surely(results.difference(other, v)) > 0 for v, other in pairs)
        best = max((other for _, other in pairs), key=lambda v: results.mean(v, "accuracy").mean)
        found[name] = (better, len(pairs), best)
    said = [
        f"`{name}` is surely better than `packed` for {better} of {count} carvers, best "
        f"`{carver_label(best)}`, {points(results.difference(best, full_tokens(results)))} points "
        "against full tokens"
        for name, (better, count, best) in found.items()
    ]
    return f"At {share(CODEC_BUDGET)}, placement: {'; '.join(said)}."


def _read_line(results: Results) -> str:
    lost = []
    for read in (v for v in results.compared.variants if v.read < v.budget):
        carved = next(
            v
            for v in at_budget(results, read.read)
            if (v.carver, v.carver_options) == (read.carver, read.carver_options)
        )
        found = results.difference(read, carved)
        if surely(found) < 0:
            lost.append(f"`{carver_label(read)}` read at {share(read.read)} ({points(found)})")
    if not any(v.read < v.budget for v in results.compared.variants):
        return ""
    return (
        "Progressive reads, of what was carved at the largest budget, surely lose against carving "
        f"to what is read: {'; '.join(lost) or 'none of those measured'}."
    )


def _wish_line(results: Results) -> str:
    """Return which variants at the codecs' budget meet the wish of the project."""
    reference, met = full_tokens(results), []
    for variant in stored_variants(results):
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
        found = results.correlation(at_budget(results, budget), "spectrum_share")
        said.append(f"{found.write('.2f')} at {share(budget)}")
    return "spectrum share " + ", ".join(said)
