import dataclasses
import math

import pytest
import torch
from torch import Tensor

from pipeline import carvers
from pipeline.carvers._rank import effective_rank
from pipeline.errors import ConfigError, NonFiniteError
from pipeline.types import CarvedTokens, VisualTokens
from tests.carvers.inputs import make_tokens


def in_order(result: CarvedTokens) -> list[int]:
    return result.positions[result.ranks.argsort()].tolist()


def literal(features: Tensor, attention: Tensor, num_kept: int, r_avg: float) -> list[int]:
    """The rule for one image, stopping at K and filling up from the deleted, in float64."""
    rows = features.double()
    singular = torch.linalg.svdvals(rows - rows.mean(dim=0))
    shares = [s / float(singular.sum()) for s in singular.tolist() if s > 1e-7 * singular[0]]
    rank = math.exp(-sum(q * math.log(q) for q in shares))
    rows = rows / rows.norm(dim=1, keepdim=True)
    order = sorted(range(len(rows)), key=lambda i: (-float(attention[i]), i))
    alive = set(order)
    kept: list[int] = []
    for place, token in enumerate(order, start=1):
        if len(kept) == num_kept or token not in alive:
            continue
        kept.append(token)
        threshold = min(place * (rank / r_avg) * 0.01, 0.25)
        alive -= {j for j in alive if j != token and 1 - float(rows[token] @ rows[j]) < threshold}
    back = [token for token in order if token not in kept]
    return kept + back[: num_kept - len(kept)]


def clustered(batch: int, grid: tuple[int, int], seed: int) -> VisualTokens:
    """Tokens around few directions, so that the sweep deletes many."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = grid[0] * grid[1]
    centres = torch.randn(batch, 6, 24, generator=generator)
    owners = torch.randint(6, (batch, num_tokens), generator=generator)
    features = torch.stack([c[o] for c, o in zip(centres, owners, strict=True)])
    features = features + 0.3 * torch.randn(features.shape, generator=generator)
    attention = torch.rand(batch, num_tokens, generator=generator)
    return VisualTokens(features=features, grid=grid, signals={"cls_attention": attention})


@pytest.mark.parametrize("r_avg", [3.0, 9.0, 90.0])
@pytest.mark.parametrize("keep", [1, 5, 17, 30])
@pytest.mark.parametrize("grid", [(4, 8), (3, 13)])
def test_it_equals_the_rule_written_out(grid, keep, r_avg):
    tokens = clustered(3, grid, seed=keep)
    carver = carvers.build("agilepruner", {"keep_tokens": keep, "r_avg": r_avg})

    results = carver.carve(tokens)

    for image, result in enumerate(results):
        attention = tokens.signals["cls_attention"][image]
        assert in_order(result) == literal(tokens.features[image], attention, keep, r_avg)


@pytest.mark.parametrize("keep", [1, 4, 7, 12, 31])
def test_back_filled_results_are_nested_too(keep):
    tokens = clustered(2, (4, 8), seed=1)
    few = carvers.build("agilepruner", {"keep_tokens": keep, "r_avg": 3.0}).carve(tokens)
    every = carvers.build("agilepruner", {"keep_tokens": 32, "r_avg": 3.0}).carve(tokens)

    for small, large in zip(few, every, strict=True):
        assert in_order(small) == in_order(large)[:keep]


def test_tokens_like_an_attended_one_come_last():
    # Two directions; the second most attended token is the same as the first.
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])[None]
    attention = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    tokens = VisualTokens(features=features, grid=(2, 2), signals={"cls_attention": attention})

    result = carvers.build("agilepruner", {"keep_tokens": 4}).carve(tokens)[0]

    assert in_order(result) == [0, 2, 1, 3]


def test_a_high_average_rank_leaves_the_order_of_attention():
    tokens = clustered(2, (4, 8), seed=2)
    carver = carvers.build("agilepruner", {"keep_tokens": 9, "r_avg": 1e9})

    for image, result in enumerate(carver.carve(tokens)):
        attention = tokens.signals["cls_attention"][image]
        assert in_order(result) == attention.argsort(descending=True)[:9].tolist()


def test_a_small_largest_threshold_deletes_copies_only():
    tokens = clustered(1, (4, 8), seed=3)
    features = tokens.features.clone()
    best = int(tokens.signals["cls_attention"].argmax())
    copy = (best + 5) % 32
    features[0, copy] = features[0, best]
    options = {"keep_tokens": 32, "r_avg": 1.0, "tau_max": 1e-4}

    result = carvers.build("agilepruner", options).carve(
        dataclasses.replace(tokens, features=features)
    )[0]

    assert in_order(result)[-1] == copy


def test_calibration_takes_the_mean_effective_rank_of_all_images():
    carver = carvers.build("agilepruner", {"keep_tokens": 9, "tau_max": 0.2})
    sample = [make_tokens([], batch=3), make_tokens([], batch=1, grid=(3, 4), seed=5)]

    calibrated = carver.calibrated(iter(sample))

    ranks = torch.cat([effective_rank(tokens.features) for tokens in sample])
    assert calibrated.r_avg == pytest.approx(float(ranks.double().mean()))
    assert calibrated == dataclasses.replace(carver, r_avg=calibrated.r_avg)
    assert carver.r_avg == 90.0


def test_calibration_refuses_an_empty_sample_and_values_that_are_not_finite():
    carver = carvers.build("agilepruner", {"keep_tokens": 9})
    broken = make_tokens([], batch=2)
    broken.features[1, 3] = torch.nan

    with pytest.raises(ConfigError, match="without images"):
        carver.calibrated([])
    with pytest.raises(NonFiniteError, match=r"image \[1\]"):
        carver.calibrated([broken])


@pytest.mark.parametrize("options", [{"r_avg": 0.0}, {"tau_max": 0.0}, {"tau_max": 2.5}])
def test_options_out_of_range_are_rejected(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        carvers.build("agilepruner", options)
