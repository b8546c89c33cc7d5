import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pipeline import carvers
from pipeline.errors import ConfigError
from pipeline.types import CarvedTokens, VisualTokens
from tests.carvers.inputs import make_tokens


def carve(tokens: VisualTokens, **options: object) -> list[CarvedTokens]:
    return carvers.build("restore_merge", options).carve(tokens)


def by_the_text(
    features: Tensor, kept: list[int], num_anchors: int, rule: str
) -> dict[int, tuple[Tensor, int]]:
    """Return position -> (feature, size), token by token as the description goes."""
    rest = [i for i in range(len(features)) if i not in kept]
    unit = {i: features[i].double() / features[i].double().norm() for i in rest}
    cosine = {(i, j): float(unit[i] @ unit[j]) for i in rest for j in rest}
    everyone = [row.double() / row.double().norm() for row in features]
    density = {i: float(sum(unit[i] @ row for row in everyone)) for i in rest}
    if rule == "code":
        density = {i: sum(cosine[i, j] for j in rest) for i in rest}
    score = {}
    for i in rest:
        if rule == "code":
            others = [cosine[i, j] for j in rest if density[j] < density[i]]
        else:
            others = [cosine[i, j] for j in rest if density[j] > density[i]]
        score[i] = density[i] * (1 - (max(others) if others else 0.0))
    anchors = sorted(sorted(rest, key=lambda i: (-score[i], i))[:num_anchors])
    groups: dict[int, list[int]] = {a: [a] for a in anchors}
    for i in rest:
        if i not in groups:
            groups[max(anchors, key=lambda a: cosine[i, a])].append(i)
    result = {i: (features[i], 1) for i in kept}
    for members in groups.values():
        members = sorted(members)
        mean = features[members].double().mean(dim=0).float()
        result[members[(len(members) - 1) // 2]] = (mean, len(members))
    return result


@pytest.mark.parametrize("rule", ["code", "paper"])
@pytest.mark.parametrize(
    ("grid", "keep", "gamma"), [((5, 7), 10, 0.5), ((6, 9), 21, 0.75), ((3, 11), 6, 0.0)]
)
def test_it_does_what_the_description_says(rule, grid, keep, gamma):
    tokens = make_tokens([], grid=grid, width=24)
    num_kept = int(keep * gamma)

    results = carve(tokens, keep_tokens=keep, gamma=gamma, rule=rule)

    for image, result in enumerate(results):
        alone = VisualTokens(features=tokens.features[[image]], grid=grid)
        kept = (
            carvers.build("divprune", {"keep_tokens": num_kept}).carve(alone)[0].positions.tolist()
            if num_kept
            else []
        )
        expected = by_the_text(tokens.features[image], kept, keep - num_kept, rule)
        assert result.positions.tolist() == sorted(expected)
        features = torch.stack([expected[p][0] for p in sorted(expected)])
        assert_close(result.features, features)
        assert result.sizes.tolist() == [expected[p][1] for p in sorted(expected)]


def test_the_two_rules_choose_other_anchors():
    tokens = make_tokens([], grid=(8, 8))

    code, paper = (carve(tokens, keep_tokens=16, rule=rule)[0] for rule in ("code", "paper"))

    assert code.positions.tolist() != paper.positions.tolist()


def test_tokens_of_the_selecting_carver_stay_as_they_are_and_its_options_count():
    tokens = make_tokens(["received_attention"], grid=(5, 7))
    options = {"selector": "fastervlm", "selector_options": {"attention": "received_attention"}}
    carver = carvers.build("restore_merge", {**options, "keep_tokens": 8})
    assert carver.needs == {"received_attention"}

    for image, result in enumerate(carver.carve(tokens)):
        best = tokens.signals["received_attention"][image].argsort(descending=True)[:4]
        rows = {int(p): i for i, p in enumerate(result.positions)}
        for position in best.tolist():
            assert torch.equal(result.features[rows[position]], tokens.features[image, position])
            assert result.sizes[rows[position]] == 1


def test_any_prefix_holds_its_share_of_selected_tokens():
    tokens = make_tokens([], grid=(8, 8))
    selected = carvers.build("divprune", {"keep_tokens": 8}).carve(tokens)

    for few, result in zip(selected, carve(tokens, keep_tokens=16), strict=True):
        first_half = result.positions[result.ranks < 8].tolist()
        assert len(set(first_half) & set(few.positions.tolist())) == 4


@pytest.mark.parametrize("selector", ["tokencarve", "tome", "average_pool"])
def test_a_selector_that_changes_tokens_is_refused(selector):
    with pytest.raises(ConfigError, match=f"selector='{selector}' does not keep tokens unchanged"):
        carvers.build("restore_merge", {"selector": selector})


def test_a_budget_of_the_selector_is_refused():
    with pytest.raises(ConfigError, match=r"selector_options hold .'keep_tokens'."):
        carvers.build("restore_merge", {"selector_options": {"keep_tokens": 3}})


def test_its_description_tells_selectors_apart():
    plain = carvers.build("restore_merge", {"selector": "scope"})
    other = carvers.build(
        "restore_merge", {"selector": "scope", "selector_options": {"alpha": 2.0}}
    )

    assert plain.describe() != other.describe()
    assert plain.describe()["selector_options"]["alpha"] == 1.0
    assert not {"keep_tokens", "keep_ratio"} & plain.describe()["selector_options"].keys()
