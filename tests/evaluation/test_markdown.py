"""The tables of an evaluation: every number is the summary's, and all of them are there."""

import pytest

from pipeline.errors import CacheFormatError
from pipeline.evaluation.markdown import render_markdown
from pipeline.evaluation.means import parse_summary
from tests.evaluation.made_results import (
    BUDGETS,
    FAMILIES,
    FULL,
    made_summary,
    made_variants,
    num_bytes,
    variant,
)

CARVERS = ["tokencarve", "random", "uniform_grid", "average_pool", "tome"]


def read_tables(text: str) -> dict[str, list[dict[str, str]]]:
    """Return the rows of each table by its title."""
    tables: dict[str, list[dict[str, str]]] = {}
    for part in text.split("### ")[1:]:
        title, *lines = part.splitlines()
        head, _, *rows = [cut(line) for line in lines if line.startswith("|")]
        assert all(len(row) == len(head) for row in rows)
        tables[title] = [dict(zip(head, row, strict=True)) for row in rows]
    return tables


def cut(line: str) -> list[str]:
    return [cell.strip().replace("\\", "") for cell in line.strip("|").split(" |")]


@pytest.fixture(scope="module")
def content() -> dict:
    return made_summary(made_variants(CARVERS))


@pytest.fixture(scope="module")
def tables(content: dict) -> dict[str, list[dict[str, str]]]:
    return read_tables(render_markdown(parse_summary(content)))


def measured(content: dict, wanted: object, family: str) -> dict:
    (row,) = [
        row
        for row in content["variants"]
        if variant_of(row) == variant_of(vars(wanted)) and row["family"] == family
    ]
    return row


def variant_of(row: dict) -> tuple:
    return tuple(row[name] for name in vars(FULL))


def percent(estimate: dict, form: str = ".1f") -> str:
    mean, low, high = (format(100 * estimate[name], form) for name in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def test_every_number_of_a_budget_table_is_the_summarys(content: dict, tables: dict) -> None:
    titles = ("1/3", "2/9", "1/9")
    rows = [row for title in titles for row in tables[f"{title} of the tokens"]]
    names = [row["carver"].removesuffix(" *") for row in rows]
    budgets = [budget for budget in BUDGETS for _ in range(len(CARVERS) + 2)]
    full = {"full tokens, fp32": FULL, "full tokens, int8": variant("identity", 1.0)}
    variants = [full.get(n) or variant(n, b) for n, b in zip(names, budgets, strict=True)]

    expected = [
        [percent(measured(content, v, family)["accuracy"]) for family in ("mean", *FAMILIES)]
        for v in variants
    ]

    assert [[row[family] for family in ("mean", *FAMILIES)] for row in rows] == expected
    assert [row["against full tokens, points"] for row in rows] == [
        percent(measured(content, v, "mean")["accuracy_difference"], "+.1f") for v in variants
    ]
    assert [row["bytes per image"] for row in rows] == [
        f"{measured(content, v, 'all')['bytes']['mean']:,.0f}" for v in variants
    ]


def test_carvers_stand_from_the_best_to_the_worst_with_full_tokens_first(tables: dict) -> None:
    rows = tables["2/9 of the tokens"]
    means = [float(row["mean"].split()[0]) for row in rows[2:]]

    assert [row["carver"] for row in rows[:2]] == ["full tokens, fp32", "full tokens, int8"]
    assert means == sorted(means, reverse=True)
    assert {row["carver"] for row in rows[2:]} == {
        "tokencarve", "tome", "random *", "uniform_grid *", "average_pool *",
    }  # fmt: skip


def test_codecs_of_one_carving_stand_below_each_other(content: dict, tables: dict) -> None:
    rows = [row for row in tables["Codecs"] if row["carver"] == "tokencarve"]

    assert {row["codec"] for row in rows} == {"int8", "int4", "fp16"}
    assert {row["tokens"] for row in rows} == {"2/9"}
    for row in rows:
        found = measured(content, variant("tokencarve", 2 / 9, codec=row["codec"]), "mean")
        assert row["equal answers, %"] == percent(found["agreement"])
        assert (
            row["bytes per image"] == f"{num_bytes(variant('tome', 2 / 9, codec=row['codec'])):,}"
        )


def test_a_progressive_read_stands_beside_carving_to_what_was_read(
    content: dict, tables: dict
) -> None:
    rows = tables["Progressive reads"]

    assert [(row["read"], row["stored"]) for row in rows] == [("2/9", "1/3"), ("1/9", "1/3")]
    for row, share in zip(rows, BUDGETS[1:], strict=True):
        prefix = measured(content, variant("tokencarve", 1 / 3, read=share), "mean")
        carved = measured(content, variant("tokencarve", share), "mean")
        assert row["read, %"] == percent(prefix["accuracy"])
        assert row["carved, %"] == percent(carved["accuracy"])


def test_costs_are_the_summarys_and_columns_never_measured_are_left_out(
    content: dict, tables: dict
) -> None:
    rows = tables["Information kept, stability, bytes and time at 1/9"]
    found = [
        measured(content, variant(row["carver"].removesuffix(" *"), 1 / 9), "all") for row in rows
    ]

    assert len(rows) == len(CARVERS)
    assert "overlap, noise 2/255, %" not in rows[0]
    assert {row["tokens"] for row in rows} == {"64.0"}
    for head, measure, factor, form in (
        ("of the image file's, %", "bytes_per_jpeg", 100, ".1f"),
        ("rank", "effective_rank", 1, ".1f"),
        ("rank, % of all tokens'", "effective_rank_share", 100, ".1f"),
        ("spectrum, %", "spectrum_share", 100, ".1f"),
        ("overlap, JPEG q95, %", "overlap_jpeg", 100, ".1f"),
        ("overlap, 1-pixel shift, %", "overlap_shift", 100, ".1f"),
        ("carving, ms", "carve_s", 1000, ".2f"),
    ):
        expected = [format(factor * measures[measure]["mean"], form) for measures in found]
        assert [row[head] for row in rows] == expected


def test_correlations_of_information_and_loss_are_the_summarys(content: dict, tables: dict) -> None:
    rows = tables["Does the information kept predict what is lost?"]
    across = content["information"]["across"]
    within = [
        row
        for row in content["information"]["within"]
        if (row["information"], row["loss"]) == ("spectrum_share", "kl")
    ]

    assert [row["across variants"] for row in rows] == [
        f"{row['spearman']:.2f} [{row['low']:.2f}, {row['high']:.2f}]" for row in across
    ]
    (found,) = [r for r in rows if (r["information"], r["loss"]) == ("spectrum share", "kl")]
    surely = sum(row["high"] < 0 for row in within)
    assert found["below 0 within variants"] == f"{surely} of {len(within)}"


def test_a_carver_that_decides_its_own_count_has_a_table_of_its_own(tables: dict) -> None:
    (row,) = tables["Carvers that decide their own count"]

    assert row["carver"] == "prumerge_plus"
    assert row["tokens"] == "576.0"


def test_without_given_answers_agreement_takes_the_place_of_accuracy() -> None:
    content = made_summary(made_variants(CARVERS), families=(), judged=False)

    text = render_markdown(parse_summary(content))

    assert "answers equal to those from full tokens" in text and "right answers" not in text
    assert list(read_tables(text)["1/3 of the tokens"][0])[:3] == ["carver", "all", "KL, nats"]


def test_a_mean_without_an_interval_stands_alone(content: dict) -> None:
    measures = {
        "agreement": {"mean": 0.5, "low": None, "high": None, "images": 1},
        "kl": {"mean": 0.25, "low": 0.125, "high": 0.375, "images": 9},
    }
    row = {**vars(variant("tome", 1 / 3)), "family": "all", "images": 9, "questions": 9}
    single = {**content, "families": [""], "variants": [{**row, **measures}]}

    tables = read_tables(render_markdown(parse_summary(single)))

    assert tables["1/3 of the tokens"][0]["all"] == "50.0"
    assert tables["1/3 of the tokens"][0]["KL, nats"] == "0.2500 [0.1250, 0.3750]"


def test_options_are_named_and_marks_of_markdown_end_no_cell() -> None:
    options = {"mode": "a|b*c"}
    content = made_summary([FULL, variant("tome", 1 / 3, options=options)], families=())

    text = render_markdown(parse_summary(content))

    assert r"| tome (mode=a\|b\*c) |" in text
    assert len(read_tables(text)["1/3 of the tokens"]) == 2


@pytest.mark.parametrize("change", [{"variants": []}, {"variants": [3]}, {"families": None}])
def test_what_is_no_summary_is_refused(content: dict, change: dict) -> None:
    with pytest.raises(CacheFormatError, match=r"summary of (the|an) evaluation"):
        parse_summary({**content, **change})
    with pytest.raises(CacheFormatError, match=r"not the summary of an evaluation"):
        parse_summary({})
