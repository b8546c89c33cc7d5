"""The page of an evaluation: it stands alone, and its plots show the summary's numbers."""

import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest

from pipeline.evaluation.drawing import seen_image
from pipeline.evaluation.means import parse_summary
from pipeline.evaluation.page import render_page
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
from pipeline.evaluation.worst import WorstCase, find_worst
from tests.evaluation.html_checker import check_page
from tests.evaluation.made_results import (
    BUDGETS,
    FAMILIES,
    FULL,
    KEYS,
    made_answers,
    made_images,
    made_summary,
    made_variants,
    variant,
)

CARVERS = ["tokencarve", "random", "uniform_grid", "average_pool", "tome", "divprune"]
VARIANTS = made_variants(CARVERS)
LABELS = Labels(x="bytes", y="right", x_tick=lambda v: f"{v:g} B", y_tick=lambda v: f"{v:.2f}")


def point(name: str, x: float, y: float, kind: str = "") -> Point:
    return Point(name=name, title=f"about {name}", x=x, y=y, low=y - 0.01, high=y + 0.01, kind=kind)


def parse(svg: str) -> ET.Element:
    return ET.fromstring(svg)


def dots(svg: str) -> dict[str, tuple[float, float]]:
    """Return where each dot stands, by its title."""
    found = {}
    for item in parse(svg).iter("g"):
        circle, title = item.find("circle"), item.find("title")
        if circle is not None and title is not None:
            found[str(title.text)] = (float(circle.attrib["cx"]), float(circle.attrib["cy"]))
    return found


def texts(svg: str) -> list[str]:
    return [str(text.text) for text in parse(svg).iter("text")]


def test_the_front_holds_what_nothing_cheaper_reaches() -> None:
    places = [(3.0, 0.5), (1.0, 0.2), (2.0, 0.6), (2.0, 0.6), (4.0, 0.9), (1.0, 0.1), (5.0, 0.9)]

    assert pareto_front(places) == [1, 2, 4]


def test_dots_stand_where_their_numbers_say_and_only_the_front_is_named() -> None:
    given = [point("a<b", 100.0, 0.5, "front"), point("c", 1000.0, 0.75), point("d", 1e4, 1.0)]

    svg = scatter(given, LABELS, marks={"files": 316.0}, levels={"full": 1.0})
    places = dots(svg)

    (x1, y1), (x2, y2), (x3, y3) = (places[f"about {name}"] for name in ("a<b", "c", "d"))
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2) and x1 < x2
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.2) and y2 < y1
    assert "a<b" in texts(svg) and "files" in texts(svg)
    assert "c" not in texts(svg) and "d" not in texts(svg)
    line = next(e for e in parse(svg).iter("line") if e.get("class") == "mark")
    assert float(line.attrib["x1"]) == pytest.approx((x1 + x2) / 2, abs=1.0)


def test_every_name_of_a_crowded_front_is_written_apart_from_the_others() -> None:
    given = [
        point(f"carver number {i}", 1000.0 * 1.08**i, 0.9 + i / 1000, "front") for i in range(9)
    ]

    svg = scatter(given, LABELS, marks={}, levels={})
    boxes = [
        (float(t.attrib["x"]), float(t.attrib["y"]), len(str(t.text)) * 6.6)
        for t in parse(svg).iter("text")
        if str(t.text).startswith("carver")
    ]

    assert len(boxes) == 9
    for i, (x, y, width) in enumerate(boxes):
        for other_x, other_y, other_width in boxes[i + 1 :]:
            apart = x + width <= other_x or other_x + other_width <= x or abs(y - other_y) >= 12
            assert apart


def test_a_single_dot_without_an_interval_can_be_drawn() -> None:
    single = replace(point("a", 10.0, 0.5, "front"), low=0.5, high=0.5)

    assert dots(scatter([single], LABELS, marks={}, levels={})).keys() == {"about a"}


def test_curves_name_the_best_and_the_baselines_at_their_ends_without_writing_over_each_other() -> (
    None
):
    lines = [
        Curve(
            name=f"line {i}", points=[point(f"{i}", 0.1, 0.5), point(f"{i}", 0.3, 0.9)], kind=kind
        )
        for i, kind in enumerate(["front", "base", "base", ""])
    ]

    svg = curves(lines, LABELS, levels={})
    ends = [float(t.attrib["y"]) for t in parse(svg).iter("text") if str(t.text).startswith("line")]

    assert len(ends) == 3
    assert min(b - a for a, b in zip(sorted(ends), sorted(ends)[1:], strict=False)) >= 14
    assert "line 3" in {str(title.text) for title in parse(svg).iter("title")}
    assert len(list(parse(svg).iter("polyline"))) == 2 * len(lines)


def test_a_heat_map_colours_the_least_orange_and_the_most_blue() -> None:
    table = heat_map(
        ["<r>"], ["x", "y", "z"], [[Cell(value=1, text="1"), Cell(value=3, text="3"), None]]
    )

    assert re.findall(r"#[0-9a-f]{6}", table) == ["#f4a582", "#92c5de"]
    assert "&lt;r&gt;" in table and '<td class="none">-</td>' in table


def test_the_page_stands_alone_and_holds_every_carver_and_number() -> None:
    content = made_summary(VARIANTS)

    page = render_page(parse_summary(content))
    text = check_page(page).text

    assert all(carver in text for carver in CARVERS)
    means = [
        f"{100 * row['accuracy']['mean']:.1f}"
        for row in content["variants"]
        if row["budget"] in BUDGETS and row["read"] == row["budget"]
    ]
    assert all(mean in text for mean in means)
    assert page.count("<svg") == 2 and page.count('class="heat"') == len(BUDGETS)
    assert "right answers, %" in text and "prumerge_plus" in text


def test_the_front_of_the_page_is_that_of_the_summary() -> None:
    content = made_summary(VARIANTS)
    rows = [row for row in content["variants"] if row["family"] == "all"]
    means = [row for row in content["variants"] if row["family"] == "mean"]
    places = [
        (row["bytes"]["mean"], mean["accuracy"]["mean"])
        for row, mean in zip(rows, means, strict=True)
    ]
    page = render_page(parse_summary(content))

    (svg, _) = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    marked = [c for c in parse(svg).iter("circle") if c.get("class") == "dot front"]

    assert len(marked) == len(pareto_front(places))
    assert len(list(parse(svg).iter("circle"))) == len(rows)


def test_a_page_without_given_answers_says_so() -> None:
    content = made_summary(VARIANTS, families=(), judged=False)

    text = check_page(render_page(parse_summary(content))).text

    assert "No right answers were given" in text and "right answers, %" not in text


def test_worst_answers_are_wrong_where_full_tokens_were_right_and_vary() -> None:
    summary = parse_summary(made_summary(VARIANTS))
    answers, images = made_answers(VARIANTS), made_images(VARIANTS)

    cases = find_worst(summary, answers, images, keys=KEYS, per_budget=3)

    assert {case.key for case in cases} <= set(KEYS[:-1])
    for budget in BUDGETS:
        chosen = [case for case in cases if case.variant.budget == budget]
        assert 1 <= len(chosen) <= 3
        assert len({case.key for case in chosen}) == len(chosen)
        assert len({case.variant.carver for case in chosen}) == len(chosen)
        assert [case.kl for case in chosen] == sorted((c.kl for c in chosen), reverse=True)
        assert all(case.answer == "something <else>" for case in chosen)
        assert all(case.full_answer.startswith(case.key) for case in chosen)
        assert all(len(case.positions) == round(16 * budget) for case in chosen)


def test_the_worst_of_all_is_there() -> None:
    summary = parse_summary(made_summary(VARIANTS))
    answers, images = made_answers(VARIANTS), made_images(VARIANTS)
    at_budget = {v for v in VARIANTS if v.budget == v.read == 2 / 9 and v.codec == "int8"}

    (case,) = [
        case
        for case in find_worst(summary, answers, images, keys=KEYS, per_budget=1)
        if case.variant.budget == 2 / 9
    ]

    wrong = [
        row["kl"]
        for row in answers.to_pylist()
        if not row["correct"] and row["full_correct"] and row["key"] != KEYS[-1]
        if variant(row["carver"], row["budget"], read=row["read"], codec=row["codec"]) in at_budget
    ]
    assert case.kl == max(wrong)


def test_worst_answers_are_drawn_and_escaped_and_those_without_a_picture_left_out() -> None:
    hostile = "<script>alert(1)</script>"
    pixels = np.full((28, 28, 3), 200, dtype=np.uint8)
    case = WorstCase(
        key=hostile,
        prompt='what is "<b>"?',
        family=FAMILIES[0],
        variant=variant("tome", 1 / 3),
        answer="<i>no</i>",
        full_answer="yes & no",
        kl=1.25,
        positions=[0, 5],
        sizes=[2.0, 1.0],
    )
    summary = parse_summary(made_summary([FULL, variant("tome", 1 / 3)]))

    page = render_page(
        summary,
        worst=[case, replace(case, key="unseen")],
        seen={hostile: seen_image(pixels, (4, 4))},
    )
    checked = check_page(page)

    assert len(checked.sources) == 2
    assert hostile in checked.text and "<i>no</i>" in checked.text and "unseen" not in checked.text
    assert "KL 1.250 nats" in checked.text


def test_a_page_says_why_there_are_no_pictures() -> None:
    summary = parse_summary(made_summary([FULL, variant("tome", 1 / 3)]))

    text = check_page(render_page(summary, problem="17 tokens do not lie over <it>")).text

    assert "No pictures: 17 tokens do not lie over <it>" in text
