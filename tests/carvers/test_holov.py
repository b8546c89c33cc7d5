import pytest
import torch

from pipeline import carvers
from pipeline.errors import ConfigError
from pipeline.types import CarvedTokens, VisualTokens
from tests.carvers.inputs import make_tokens


def row(*attention: float) -> VisualTokens:
    return VisualTokens(
        features=torch.arange(1.0, len(attention) + 1)[None, :, None],
        grid=(1, len(attention)),
        signals={"cls_attention": torch.tensor([attention]).float()},
    )


def in_order(result: CarvedTokens) -> list[int]:
    return result.positions[result.ranks.argsort()].tolist()


def literal(attention: list[float], keep: int, crops: int) -> set[int]:
    """The kept positions of one image, strip by strip."""
    short, longer = divmod(len(attention), crops)
    strips: list[list[int]] = []
    for crop in range(crops):
        start = sum(map(len, strips))
        strips.append(list(range(start, start + short + (crop < longer))))
    means = [sum(attention[p] for p in strip) / len(strip) for strip in strips]
    quotas = [int(keep * mean / sum(means)) for mean in means]
    for crop in sorted(range(crops), key=lambda c: -means[c])[: keep - sum(quotas)]:
        quotas[crop] += 1
    kept: set[int] = set()
    for strip, quota in zip(strips, quotas, strict=True):
        kept |= set(sorted(strip, key=lambda p: -attention[p])[:quota])
    others = sorted(set(range(len(attention))) - kept, key=lambda p: -attention[p])
    return kept | set(others[: keep - len(kept)])


@pytest.mark.parametrize("signal", ["cls_attention", "received_attention"])
@pytest.mark.parametrize("crops", [1, 3, 4, 7, 33])
@pytest.mark.parametrize("keep", [1, 6, 20, 30])
def test_it_equals_the_rule_written_out(keep, crops, signal):
    options = {"keep_tokens": keep, "crops": crops, "attention": signal}
    tokens = make_tokens([signal], batch=3, grid=(3, 11))
    tokens.signals[signal].pow_(4)  # uneven, so that some strips are due more than they hold

    results = carvers.build("holov", options).carve(tokens)

    for image, result in enumerate(results):
        attention = tokens.signals[signal][image].tolist()
        assert set(result.positions.tolist()) == literal(attention, keep, min(crops, 33))


def test_shares_follow_the_mean_attention_of_a_strip():
    # Two strips of 4: sums 60 and 20, so 3 and 1 of 4 tokens.
    tokens = row(10, 20, 20, 10, 2, 6, 7, 5)

    result = carvers.build("holov", {"keep_tokens": 4, "crops": 2}).carve(tokens)[0]

    assert result.positions.tolist() == [0, 1, 2, 6]
    # By place / share: 1/3 and 2/3 of the first strip, then 3/3 and 1/1, the more attended first.
    assert in_order(result) == [1, 2, 0, 6]


def test_what_rounding_leaves_goes_to_the_strips_of_most_attention_not_to_the_largest_rest():
    # Means 5 : 3 : 2 of 6 tokens is 3.0, 1.8, 1.2: floors 3, 1, 1, and the last goes to the first.
    tokens = row(*[5] * 5, *[3] * 5, *[2] * 5)

    result = carvers.build("holov", {"keep_tokens": 6, "crops": 3}).carve(tokens)[0]

    assert result.positions.tolist() == [0, 1, 2, 3, 5, 10]


def test_a_strip_that_is_due_more_than_it_holds_gives_places_to_the_best_of_the_others():
    tokens = row(1.0, 1.0, 0.0, 0.001, 0.002, 0.0)

    result = carvers.build("holov", {"keep_tokens": 4, "crops": 3}).carve(tokens)[0]

    assert result.positions.tolist() == [0, 1, 3, 4]
    assert (result.features != 0).all()


def test_without_any_attention_the_strips_share_equally():
    result = carvers.build("holov", {"keep_tokens": 4, "crops": 2}).carve(row(*[0.0] * 8))[0]

    assert result.positions.tolist() == [0, 1, 4, 5]


@pytest.mark.parametrize(("keep", "crops"), [(64, 16), (128, 8), (32, 32)])
def test_by_default_there_are_as_many_strips_as_published(keep, crops):
    tokens = make_tokens(["cls_attention"], batch=1, grid=(24, 24), width=1)
    tokens.signals["cls_attention"].add_(1)

    default, named = (
        carvers.build("holov", {"keep_tokens": keep, **options}).carve(tokens)[0]
        for options in ({}, {"crops": crops})
    )

    assert in_order(default) == in_order(named)
    other = carvers.build("holov", {"keep_tokens": keep, "crops": crops + 1}).carve(tokens)[0]
    assert in_order(other) != in_order(named)


def test_no_strip_at_all_is_rejected():
    with pytest.raises(ConfigError, match="crops"):
        carvers.build("holov", {"crops": 0})
