"""The results of an evaluation as one HTML page that needs no other file.

Made with this package alone: plots are inline SVG (`plots.py` says why), pictures are inside.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape

from pipeline.evaluation.document import document, picture
from pipeline.evaluation.drawing import SeenImage, draw_image, draw_tokens
from pipeline.evaluation.means import (
    Estimate,
    Means,
    carver_label,
    codec_label,
    is_baseline,
    share,
)
from pipeline.evaluation.plots import (
    Cell,
    Curve,
    Labels,
    Point,
    curves,
    heat_map,
    pareto_front,
    scatter,
)
from pipeline.evaluation.tables import MEASURES, Table, percent, result_tables
from pipeline.evaluation.variants import FULL, Variant
from pipeline.evaluation.worst import WorstCase

_WIDTH = 320  # pixels of a picture


def render_page(
    means: Means,
    *,
    worst: Sequence[WorstCase] = (),
    seen: Mapping[str, SeenImage] | None = None,
    problem: str = "",
) -> str:
    """Return the page: valid HTML, no scripts, no links to other files.

    Args:
        means: all of them.
        worst: single answers to show, as `find_worst` gives them.
        seen: by key, what the model saw of the images of `worst`; those without are left out.
        problem: why there are no pictures, if so; stands in their place.
    """
    sections = (
        _header(means),
        _bytes_plot(means),
        _budget_plot(means),
        _heat_maps(means),
        _worst_cases(worst, seen or {}, problem),
        _tables(result_tables(means)),
    )
    return document("carve evaluate", filter(None, sections))


def _header(means: Means) -> str:
    names = {carver_label(v) for v in means.variants if v.carver != FULL}
    codecs = {codec_label(v) for v in means.variants}
    facts = [
        (str(len(names)), "carvers"),
        (", ".join(share(budget) for budget in means.budgets) or "1", "of the tokens kept"),
        (str(len(codecs)), "codecs"),
        (f"{means.num_images:,}", f"images, {means.num_questions:,} questions"),
    ]
    tiles = "".join(f"<li><b>{escape(value)}</b><span>{name}</span></li>" for value, name in facts)
    what = (
        "Answers are judged against those that were given."
        if means.measure == "accuracy"
        else "No right answers were given: answers are compared with those from full tokens."
    )
    return (
        f"<header><h1>What carving costs</h1>\n<p>{what} All intervals are 95 % intervals of a "
        f'bootstrap over images.</p>\n<ul class="tiles">{tiles}</ul></header>'
    )


def _bytes_plot(means: Means) -> str:
    points, places = [], []
    for variant in means.variants:
        found, size = means.get(variant, means.measure), means.get(variant, "bytes")
        if found is not None and size is not None:
            points.append(_point(variant, found, size.mean))
            places.append((size.mean, found.mean))
    if not points:
        return ""
    front = set(pareto_front(places))
    marked = [
        replace(point, kind="front") if index in front else point
        for index, point in enumerate(points)
    ]
    files = _first(means, "jpeg_bytes")
    plot = scatter(
        marked,
        Labels(x="bytes per image", y=MEASURES[means.measure], x_tick=_size, y_tick=_per_cent),
        marks={} if files is None else {"the image files": files.mean},
        levels=_full_level(means),
    )
    return (
        "<section><h2>Quality against bytes</h2>\n<p>One dot for each carver, budget, codec and "
        "share that is read; its name when pointed at. In orange the ones that nothing beats at "
        "their size, joined and named; in green the baselines. The dashed line is the mean size of "
        f"the image files.</p>\n{plot}</section>"
    )


def _point(variant: Variant, found: Estimate, x: float) -> Point:
    part = "" if variant.read == variant.budget else f", {share(variant.read)} read"
    kept = "" if variant.budget == 1 else f" {share(variant.budget)}{part}"
    name = f"{_name(variant)}{kept}, {codec_label(variant)}"
    return Point(
        name=name,
        title=f"{name}: {percent(found)} at {_size(x)}",
        x=x,
        y=found.mean,
        low=found.floor,
        high=found.ceiling,
        kind="base" if is_baseline(variant) else "",
    )


def _budget_plot(means: Means) -> str:
    lines: dict[str, list[Point]] = {}
    best = {carver_label(v[0]) for b in means.budgets if (v := means.at_budget(b))}
    baselines = set()
    for budget in reversed(means.budgets):
        for variant in means.at_budget(budget):
            found, label = means.get(variant, means.measure), carver_label(variant)
            if found is not None:
                title = f"{label}: {percent(found)} at {share(budget)}"
                lines.setdefault(label, []).append(
                    Point(
                        name=label,
                        title=title,
                        x=budget,
                        y=found.mean,
                        low=found.floor,
                        high=found.ceiling,
                    )
                )
                baselines |= {label} if is_baseline(variant) else set()
    if not lines:
        return ""
    drawn = [
        Curve(
            name=name,
            points=points,
            kind="front" if name in best else "base" if name in baselines else "",
        )
        for name, points in lines.items()
    ]
    labels = Labels(x="tokens kept", y=MEASURES[means.measure], x_tick=share, y_tick=_per_cent)
    plot = curves(drawn, labels, levels=_full_level(means))
    return (
        "<section><h2>Quality against budget</h2>\n<p>One line for each carver, stored by "
        f"{escape(means.codec[0])}. In orange the best carver at each budget, in green the "
        f"baselines; the others' names when pointed at.</p>\n{plot}</section>"
    )


def _full_level(means: Means) -> dict[str, float]:
    """Return where full tokens stand, uncompressed."""
    reference = means.reference
    found = means.get(reference, means.measure) if reference else None
    return {} if found is None else {"full tokens": found.mean}


def _heat_maps(means: Means) -> str:
    maps = "".join(_heat_map(means, budget) for budget in means.budgets)
    if not maps:
        return ""
    return (
        "<section><h2>Families of questions</h2>\n<p>Carvers from the best to the worst. Orange is "
        "the lowest number of a table, blue the highest; the interval when pointed at.</p>\n"
        f'<div class="row">{maps}</div></section>'
    )


def _heat_map(means: Means, budget: float) -> str:
    variants = means.at_budget(budget)
    cells = [
        [_cell(means.get(variant, means.measure, family)) for family in means.columns]
        for variant in variants
    ]
    names = [f"{carver_label(v)}{' *' if is_baseline(v) else ''}" for v in variants]
    title = f"<h3>{share(budget)} of the tokens, {escape(MEASURES[means.measure])}</h3>"
    return f"<div>{title}{heat_map(names, means.columns, cells)}</div>"


def _cell(found: Estimate | None) -> Cell | None:
    if found is None:
        return None
    return Cell(value=found.mean, text=_per_cent(found.mean, digits=1), title=percent(found))


def _tables(tables: Sequence[Table]) -> str:
    return f"<section><h2>Tables</h2>\n{''.join(_table(table) for table in tables)}</section>"


def _table(table: Table) -> str:
    first, *others = (escape(name) for name in table.head)
    head = f'<th scope="col">{first}</th>' + "".join(
        f'<th class="n" scope="col">{name}</th>' for name in others
    )
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f'<td class="n">{escape(cell)}</td>' for cell in row[1:])
        + "</tr>"
        for row in table.rows
    )
    return (
        f'<details><summary>{escape(table.title)}</summary><p class="note">{escape(table.note)}'
        f'</p><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></details>\n"
    )


def _worst_cases(worst: Sequence[WorstCase], seen: Mapping[str, SeenImage], problem: str) -> str:
    figures = "".join(_figure(case, seen[case.key]) for case in worst if case.key in seen)
    if problem:
        figures = f'<p class="note">No pictures: {escape(problem)}</p>'
    if not figures:
        return ""
    return (
        "<section><h2>Worst answers</h2>\n<p>Single questions that full tokens answer right and "
        "carved ones wrong, or whose first token changes most. Left, the image as the model saw "
        "it; right, the tokens that were kept.</p>\n"
        f'<div class="gallery">{figures}</div></section>'
    )


def _figure(case: WorstCase, seen: SeenImage) -> str:
    drawn = picture(draw_tokens(seen, case.positions, case.sizes), alt="kept tokens", width=_WIDTH)
    asked = f"<dt>question</dt><dd>{escape(case.prompt)}</dd>" if case.prompt else ""
    return (
        f'<figure><div class="pair">{picture(draw_image(seen), alt=case.key, width=_WIDTH)}{drawn}'
        f"</div><figcaption>{escape(_name(case.variant))}, {share(case.variant.budget)} of the "
        f"tokens <code>{escape(case.key)}</code><br><small>KL {case.kl:.3f} nats"
        f"{f', family {escape(case.family)}' if case.family else ''}</small><dl>{asked}"
        f"<dt>from full tokens</dt><dd>{escape(case.full_answer)}</dd>"
        f"<dt>from carved tokens</dt><dd>{escape(case.answer)}</dd></dl></figcaption></figure>"
    )


def _name(variant: Variant) -> str:
    return "full tokens" if variant.carver == FULL else carver_label(variant)


def _first(means: Means, measure: str) -> Estimate | None:
    found = (means.get(variant, measure) for variant in means.variants)
    return next((estimate for estimate in found if estimate is not None), None)


def _per_cent(value: float, *, digits: int = 0) -> str:
    return f"{value * 100:.{digits}f}"


def _size(num_bytes: float) -> str:
    if num_bytes < 1e3:
        return f"{num_bytes:.0f} B"
    return f"{num_bytes / 1e3:.3g} kB" if num_bytes < 1e6 else f"{num_bytes / 1e6:.3g} MB"
