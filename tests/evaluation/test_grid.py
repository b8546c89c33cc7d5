"""The grid of variants and the config it comes from."""

from typing import Any

import pytest

from pipeline import carvers
from pipeline.errors import ConfigError
from pipeline.evaluation.settings import load_evaluation, parse_evaluation
from pipeline.evaluation.variants import Grid, build_grid, tokens_of
from pipeline.types import SIGNALS
from tests.conftest import ROOT

PLACES = {"input": {"shards": "s.tar"}, "output": "out", "encoder": {"name": "llava"}}


def grid(yields: frozenset[str] = frozenset(SIGNALS), **evaluation: Any) -> Grid:
    return build_grid(parse_evaluation({**PLACES, "evaluation": evaluation}).evaluation, yields)


def test_reference_full_tokens_and_baselines_are_always_there() -> None:
    variants = grid(carvers=[], budgets=["1/4"], codecs=["int8", "fp32"]).variants

    assert [(v.carver, v.budget, v.codec) for v in variants] == [
        ("identity", 1.0, "fp32"),
        ("identity", 1.0, "int8"),
        ("random", 0.25, "int8"),
        ("random", 0.25, "fp32"),
        ("uniform_grid", 0.25, "int8"),
        ("uniform_grid", 0.25, "fp32"),
        ("average_pool", 0.25, "int8"),
        ("average_pool", 0.25, "fp32"),
    ]


def test_reads_are_smaller_than_the_budget_and_variants_are_unique() -> None:
    found = grid(carvers=["divprune", "divprune"], budgets=["1/3", "1/9"], reads=["1/3", "1/9"])

    rows = [(v.budget, v.read) for v in found.variants if v.carver == "divprune"]
    assert rows == [(1 / 3, 1 / 3), (1 / 3, 1 / 9), (1 / 9, 1 / 9)]
    assert len(found.variants) == len(set(found.variants))


def test_a_carver_may_occur_with_several_options_and_is_given_the_budget() -> None:
    plugins = [{"name": "adaptive", "options": {"carver": "divprune"}}, "adaptive"]

    cuts = [c for c in grid(carvers=plugins, budgets=[0.5]).cuts if c.name == "adaptive"]

    assert [cut.options for cut in cuts] == ['{"carver": "divprune"}', "{}"]
    assert [cut.carver.describe()["mean_ratio"] for cut in cuts] == [0.5, 0.5]


def test_a_carver_without_a_budget_is_there_once() -> None:
    found = grid(carvers=["doc_correlation"], reads=["1/9"])

    rows = [(v.budget, v.read) for v in found.variants if v.carver == "doc_correlation"]
    assert rows == [(1.0, 1.0)]


def test_all_takes_every_carver_that_the_encoder_can_serve() -> None:
    everything = grid(carvers=["all"])
    few = grid(yields=frozenset(), carvers=["all"])

    assert {cut.name for cut in everything.cuts} == set(carvers.names())
    assert everything.left_out == {}
    assert {cut.name for cut in few.cuts} | few.left_out.keys() == set(carvers.names())
    assert few.left_out["fastervlm"] == "needs cls_attention"


def test_every_mistake_of_a_grid_is_named_at_once() -> None:
    plugins = ["fastervlm", "divprun", {"name": "random", "options": {"keep_tokens": 3}}]

    with pytest.raises(ConfigError) as caught:
        grid(yields=frozenset(), carvers=plugins, codecs=["int9"])

    message = str(caught.value)
    assert "carver 'fastervlm' needs cls_attention" in message
    assert "did you mean 'divprune'?" in message
    assert "carver 'random': give keep_tokens by evaluation.budgets" in message
    assert "no codec named 'int9'" in message


def test_every_mistake_of_a_config_is_named_at_once() -> None:
    values = {**PLACES, "evaluation": {"budgets": ["3/2", "x"], "codec": [], "seed": -1}}

    with pytest.raises(ConfigError) as caught:
        parse_evaluation(values)

    message = str(caught.value)
    assert "evaluation.budgets.0" in message and "evaluation.budgets.1" in message
    assert "evaluation.codec: unknown key; did you mean 'codecs'?" in message
    assert "evaluation.seed" in message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"images": "folder"}, "give exactly one"),
        ({"output": ""}, "output: must be given"),
        ({"evaluation": {"questions": "q", "column": "json"}}, "give at most one"),
        ({"evaluation": {"template": "<image>"}}, "must hold {prompt}"),
        ({"evaluation": {"prompts": ["a", "a"]}}, "one occurs twice"),
        ({"evaluation": {"prompts": []}}, "evaluation.prompts"),
    ],
)
def test_contradictions_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_evaluation({**PLACES, **values})


def test_options_lie_over_nothing_and_settings_over_options() -> None:
    config = load_evaluation(
        None,
        values={**PLACES, "evaluation.budgets": ["2/9"]},
        overrides=["evaluation.reads=[1/18]", "runner.batch_size=3"],
    )

    assert config.evaluation.budgets == [2 / 9]
    assert config.evaluation.reads == [1 / 18]
    assert config.runner.batch_size == 3


def test_shares_count_tokens_as_carvers_do() -> None:
    assert [tokens_of(share, 576) for share in (1 / 3, 2 / 9, 1 / 9, 1 / 18)] == [192, 128, 64, 32]
    assert tokens_of(0.001, 16) == 1


def test_the_example_config_is_whole_and_its_grid_can_be_built() -> None:
    config = load_evaluation(ROOT / "configs" / "evaluate.yaml")

    variants = build_grid(config.evaluation, frozenset(SIGNALS)).variants

    assert {v.carver for v in variants} >= {"identity", "random", "tokencarve", "visionzip"}
    assert any(v.read < v.budget for v in variants)
