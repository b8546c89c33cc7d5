import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from pipeline import carvers
from pipeline.carve_shard import ShardCarver
from pipeline.carvers import _scorer
from pipeline.errors import ConfigError
from pipeline.job import resolve_job
from pipeline.types import CarvedTokens, VisualTokens
from tests.carvers.inputs import make_tokens
from tests.fakes import FakeEncoder, fake_config
from tests.golden import golden_cases

CASES = golden_cases("idpruner_mmr")


def in_order(result: CarvedTokens) -> list[int]:
    return result.positions[result.ranks.argsort()].tolist()


def literal(
    features: Tensor, scores: Tensor, num_kept: int, weight: float, per_round: int = 1
) -> list[int]:
    """The rule for one image, pick by pick, in float64."""
    rows = features.double()
    rows = rows / rows.norm(dim=1, keepdim=True)
    importance = [
        float(s - scores.min()) / (float(scores.max() - scores.min()) + 1e-6) for s in scores
    ]
    picks = [importance.index(max(importance))]
    while len(picks) < num_kept:
        rated = {
            j: weight * importance[j] - (1 - weight) * max(float(rows[j] @ rows[p]) for p in picks)
            for j in range(len(rows))
            if j not in picks
        }
        best = sorted(rated, key=lambda j: (-rated[j], j))
        picks += best[: min(per_round, num_kept - len(picks))]
    return picks


def make_scorer(path: Path, width: int = 40, bias: bool = True, **changes: Tensor) -> str:
    generator = torch.Generator().manual_seed(3)
    tensors = {f"{p}_proj.weight": torch.randn(6, width, generator=generator) for p in "qk"}
    if bias:
        tensors |= {f"{p}_proj.bias": torch.randn(6, generator=generator) for p in "qk"}
    save_file({**tensors, **changes}, path)
    return str(path)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_equals_the_stored_outputs_of_the_released_code(case):
    options = {n: case.options[n] for n in ("keep_tokens", "importance_weight", "picks_per_round")}
    tokens = VisualTokens(
        features=case.inputs["features"][None],
        grid=(1, len(case.inputs["features"])),
        signals={"cls_attention": case.inputs["scores"][None]},
    )

    result = carvers.build("mmr", options).carve(tokens)[0]

    assert result.positions.tolist() == case.expected["positions"].tolist()
    assert in_order(result) == case.expected["selection_order"].tolist()
    assert torch.equal(result.features, case.expected["features"])


@pytest.mark.parametrize("per_round", [1, 2, 5])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("grid", [(1, 9), (4, 6), (3, 11)])
def test_it_equals_the_rule_written_out(grid, weight, per_round):
    options = {"keep_tokens": 9, "importance_weight": weight, "picks_per_round": per_round}
    options["attention"] = "received_attention"
    tokens = make_tokens(["received_attention"], batch=2, grid=grid, width=10)

    results = carvers.build("mmr", options).carve(tokens)

    for image, result in enumerate(results):
        scores = tokens.signals["received_attention"][image]
        expected = literal(tokens.features[image], scores, 9, weight, per_round)
        assert in_order(result) == expected


def test_scores_that_hardly_differ_count_less():
    tokens = make_tokens(["cls_attention"], batch=1)
    tokens.signals["cls_attention"].mul_(1e-6)

    result = carvers.build("mmr", {"keep_tokens": 9}).carve(tokens)[0]

    scores = tokens.signals["cls_attention"][0]
    assert in_order(result) == literal(tokens.features[0], scores, 9, 0.5)
    assert in_order(result) != literal(tokens.features[0], scores * 1e6, 9, 0.5)


@pytest.mark.parametrize("keep", [1, 2, 6, 7, 20])
def test_rounds_of_several_picks_are_nested_too(keep):
    tokens = make_tokens(["cls_attention"], batch=2)
    few = carvers.build("mmr", {"keep_tokens": keep, "picks_per_round": 5}).carve(tokens)
    many = carvers.build("mmr", {"keep_tokens": 30, "picks_per_round": 5}).carve(tokens)

    for small, large in zip(few, many, strict=True):
        assert in_order(small) == in_order(large)[:keep]


def test_a_copy_of_an_important_token_waits():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])[None]
    attention = torch.tensor([[0.9, 0.8, 0.1]])
    tokens = VisualTokens(features=features, grid=(1, 3), signals={"cls_attention": attention})

    result = carvers.build("mmr", {"keep_tokens": 3}).carve(tokens)[0]

    # After 0: token 1 has 0.5 * 0.875 - 0.5 < 0, token 2 has 0.
    assert in_order(result) == [0, 2, 1]


@pytest.mark.parametrize("bias", [True, False])
def test_the_scorer_rates_a_token_by_its_mean_answer_to_all(tmp_path, bias):
    path = make_scorer(tmp_path / "scorer.safetensors", bias=bias)
    query, key = torch.nn.Linear(40, 6), torch.nn.Linear(40, 6)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        query.weight.copy_(torch.randn(6, 40, generator=generator))
        key.weight.copy_(torch.randn(6, 40, generator=generator))
        query.bias.copy_(torch.randn(6, generator=generator) if bias else torch.zeros(6))
        key.bias.copy_(torch.randn(6, generator=generator) if bias else torch.zeros(6))
    features = make_tokens([]).features

    scores = _scorer.scores(features, path)

    with torch.no_grad():
        expected = (query(features) @ key(features).mT / 6**0.5).mean(dim=2)
    assert_close(scores, expected, rtol=1e-4, atol=1e-4)


def test_a_scorer_takes_the_place_of_the_attention(tmp_path):
    path = make_scorer(tmp_path / "scorer.safetensors")
    carver = carvers.build("mmr", {"keep_tokens": 9, "scorer": path})
    tokens = make_tokens([], batch=3)

    results = carver.carve(tokens)

    assert carver.needs == frozenset()
    for image, result in enumerate(results):
        scores = _scorer.scores(tokens.features, path)[image]
        assert in_order(result) == literal(tokens.features[image], scores, 9, 0.5)


def test_scores_of_an_image_do_not_depend_on_its_batch_mates(tmp_path):
    path = make_scorer(tmp_path / "scorer.safetensors", width=200)
    features = make_tokens([], batch=7, width=200).features

    together = _scorer.scores(features, path)

    for image in range(7):
        assert torch.equal(_scorer.scores(features[[image]], path)[0], together[image])


def test_a_pickled_carver_holds_the_place_of_the_scorer_only(tmp_path):
    carver = carvers.build("mmr", {"scorer": make_scorer(tmp_path / "s.safetensors", width=4000)})
    tokens = make_tokens([], batch=1, width=4000)
    expected = carver.carve(tokens)[0]

    stored = pickle.dumps(carver)

    assert len(stored) < 1000
    assert torch.equal(pickle.loads(stored).carve(tokens)[0].positions, expected.positions)


def test_the_content_of_the_scorer_identifies_the_work_and_its_place_does_not(tmp_path):
    paths = [make_scorer(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    paths.append(make_scorer(tmp_path / "c.safetensors", bias=False))

    described = [carvers.build("mmr", {"scorer": path}).describe() for path in paths]

    assert described[0] == described[1] != described[2]
    assert described[0]["scorer"].startswith("sha256:")
    assert carvers.build("mmr").describe()["scorer"] is None


def test_a_relative_place_is_made_absolute(tmp_path, monkeypatch):
    make_scorer(tmp_path / "s.safetensors")
    monkeypatch.chdir(tmp_path)
    carver = carvers.build("mmr", {"scorer": "s.safetensors"})
    monkeypatch.chdir("/")

    assert carver.describe()["scorer"].startswith("sha256:")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q_proj.weight": torch.zeros(6, 39)}, r"takes features of width 39, .* 40"),
        ({"k_proj.weight": torch.zeros(6, 39)}, r"k_proj.weight.*\(6, 39\)"),
        ({"k_proj.bias": torch.zeros(5)}, r"k_proj.bias.*\(5,\)"),
        ({"v_proj.weight": torch.zeros(6, 40)}, "v_proj.weight.*, not"),
    ],
)
def test_a_file_that_does_not_fit_is_an_error(tmp_path, changes, message):
    bias = "k_proj.bias" in changes or "v_proj.weight" in changes
    if "q_proj.weight" in changes:
        changes = {**changes, "k_proj.weight": torch.zeros(6, 39)}
    path = make_scorer(tmp_path / "s.safetensors", bias=bias, **changes)

    with pytest.raises(ConfigError, match=message):
        carvers.build("mmr", {"scorer": path}).carve(make_tokens([]))


def test_a_missing_or_foreign_file_is_an_error(tmp_path):
    missing = carvers.build("mmr", {"scorer": str(tmp_path / "none")})
    (tmp_path / "foreign").write_bytes(b"not a safetensors file")
    foreign = carvers.build("mmr", {"scorer": str(tmp_path / "foreign")})

    with pytest.raises(ConfigError, match="cannot be read"):
        missing.describe()
    for carver in (missing, foreign):
        with pytest.raises(ConfigError, match="cannot be read"):
            carver.carve(make_tokens([]))


@pytest.mark.parametrize(
    "options", [{"importance_weight": 1.5}, {"importance_weight": -0.1}, {"picks_per_round": 0}]
)
def test_options_out_of_range_are_rejected(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        carvers.build("mmr", options)


def test_a_run_is_planned_with_the_scorers_content_and_refuses_another(tmp_path):
    path = make_scorer(tmp_path / "s.safetensors", width=64)
    carver = {"name": "mmr", "options": {"keep_tokens": 4, "scorer": path}}
    config = fake_config(tmp_path, tmp_path / "cache", carver=carver)
    job = resolve_job(config, encoder=FakeEncoder())
    ShardCarver(job).load()

    make_scorer(tmp_path / "s.safetensors", width=64, bias=False)

    with pytest.raises(ConfigError, match=r"carver on host .* is not the one this run was"):
        ShardCarver(job).load()
    assert resolve_job(config, encoder=FakeEncoder()).fingerprint != job.fingerprint
    Path(path).unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        resolve_job(config, encoder=FakeEncoder())
