import math

import pytest
import torch

from pipeline import carvers
from pipeline.types import CarvedTokens, VisualTokens


def carve(tokens: VisualTokens, **options: object) -> list[CarvedTokens]:
    return carvers.build("flowcut", options).carve(tokens)


def recorded(flow: torch.Tensor, grid: tuple[int, int] | None = None, views: int = 1):
    """Return tokens with this (B, N, L, 3) flow; a feature is the token's position."""
    num_images, num_tokens = flow.shape[:2]
    features = torch.arange(num_tokens).float()[None, :, None].repeat(num_images, 1, 1)
    return VisualTokens(
        features=features,
        grid=grid or (1, num_tokens),
        signals={"attention_flow": flow.float()},
        num_views=views,
    )


def random_flow(num_tokens: int, layers: int, *, sharpness: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(2, num_tokens, layers, 3, generator=generator)
    attention = torch.softmax(sharpness * normal[..., 0], dim=1)
    similarity = torch.softmax(normal[..., 1], dim=1)
    return torch.stack([attention, similarity, 1 + normal[..., 2].abs()], dim=-1)


def slow(flow: torch.Tensor, keep: int) -> tuple[list[int], list[int]]:
    """Layer by layer and token by token; the kept positions, and how many are left per layer."""
    flow = flow.double()
    left = list(range(len(flow)))
    total: dict[int, float] = {}
    counts = []
    last = flow.shape[1] - 2
    for layer in range(last + 1):
        to_go = last - layer
        attention = {i: float(flow[i, layer, 0]) for i in left}
        similarity = {i: float(flow[i, layer, 1]) for i in left}
        attention = {i: a / sum(attention.values()) for i, a in attention.items()}
        similarity = {i: s / sum(similarity.values()) for i, s in similarity.items()}
        for i in left:
            score = (attention[i] + similarity[i]) * float(flow[i, layer, 2])
            total[i] = score if layer == 0 else 0.5 * total[i] + 0.5 * score
        if to_go % 2 == 0 and len(left) > keep:
            entropy = -sum(a * math.log(a) for a in attention.values())
            concentration = 1 - (entropy / math.log(len(left))) ** 2
            wanted = keep
            if to_go > 0:
                gone = round((len(left) - keep) / math.sqrt(to_go) * concentration)
                wanted = max(keep, len(left) - gone)
            left = sorted(sorted(left, key=lambda i: -total[i])[:wanted])
        counts.append(len(left))
    return left, counts


@pytest.mark.parametrize("layers", [23, 12, 5, 2])
@pytest.mark.parametrize(("num_tokens", "keep"), [(144, 16), (144, 100), (35, 1), (20, 19)])
@pytest.mark.parametrize("sharpness", [0.5, 2.0])
def test_it_equals_a_slow_loop(layers, num_tokens, keep, sharpness):
    flow = random_flow(num_tokens, layers, sharpness=sharpness, seed=layers + keep)

    results = carve(recorded(flow), keep_tokens=keep)

    for image, result in enumerate(results):
        assert result.positions.tolist() == slow(flow[image], keep)[0]
        assert torch.equal(result.features[:, 0].long(), result.positions)


def test_the_slow_loop_drops_tokens_in_several_layers():
    flow = random_flow(144, 23, sharpness=2.0, seed=39)

    _, counts = slow(flow[0], 16)

    assert len(set(counts)) >= 8
    assert counts[0] == 144  # 21 layers to go: odd
    assert counts[-1] == 16


def test_a_token_dropped_early_does_not_come_back():
    # Five layers: cuts with 2 and with 0 layers to go. All attention of layer 1 lies on token 0,
    # so that the other half drops out there; token 3 is only found worthwhile afterwards.
    flow = torch.full((1, 4, 5, 3), 0.25)
    flow[0, :, :2, 0] = torch.tensor([1.0, 0.0, 0.0, 0.0])[:, None]
    flow[0, :, :2, 1] = torch.tensor([0.4, 0.3, 0.2, 0.1])[:, None]
    flow[0, 3, 2:, :] = 100.0

    result = carve(recorded(flow), keep_tokens=1)[0]

    # With 2 to go, round(3 / sqrt(2) * 1) = 2 tokens go, by the lowest scores: 2 and 3.
    assert result.positions.tolist() == [0]


def test_evenly_spread_attention_drops_nothing_before_the_last_cut():
    # So token 3, the least of all in the first layers, is still there when it counts.
    flow = torch.full((1, 4, 5, 3), 0.25)
    flow[0, :, :2, 1] = torch.tensor([0.4, 0.3, 0.2, 0.1])[:, None]
    flow[0, 3, 2:, 1] = 100.0

    result = carve(recorded(flow), keep_tokens=1)[0]

    assert result.positions.tolist() == [3]


def test_the_selected_layer_itself_is_not_looked_at():
    flow = random_flow(30, 6, sharpness=1.0, seed=1)
    changed = flow.clone()
    changed[:, :, -1] = changed[:, :, -1].flip(1)

    for left, right in zip(
        carve(recorded(flow), keep_tokens=7), carve(recorded(changed), keep_tokens=7), strict=True
    ):
        assert torch.equal(left.positions, right.positions)


def test_one_layer_is_enough():
    flow = torch.tensor([[0.1, 0.2, 1.0], [0.5, 0.5, 1.0], [0.4, 0.3, 1.0]])[None, :, None]

    result = carve(recorded(flow), keep_tokens=2)[0]

    assert result.positions.tolist() == [1, 2]
    assert result.ranks.tolist() == [0, 1]


def test_longer_values_and_values_like_that_of_the_class_raise_the_score():
    flow = torch.full((1, 3, 2, 3), 0.5)
    flow[0, 1, :, 2] = 2.0
    flow[0, 2, :, 1] = 0.9

    result = carve(recorded(flow), keep_tokens=3)[0]

    assert result.positions[result.ranks.argsort()].tolist() == [1, 2, 0]


def test_the_number_dropped_is_that_of_the_image_not_of_the_batch():
    flow = random_flow(60, 12, sharpness=0.3, seed=3)
    flow[1] = random_flow(60, 12, sharpness=4.0, seed=4)[1]

    together = carve(recorded(flow), keep_tokens=10)

    for image in range(2):
        alone = carve(recorded(flow[image : image + 1]), keep_tokens=10)[0]
        assert torch.equal(together[image].positions, alone.positions)


def test_each_view_has_an_equal_share():
    flow = random_flow(48, 7, sharpness=1.0, seed=6)

    result = carve(recorded(flow, grid=(4, 4), views=3), keep_tokens=12)[0]

    alone = [slow(flow[0, 16 * view : 16 * view + 16], 4)[0] for view in range(3)]
    assert result.positions.tolist() == [16 * v + p for v in range(3) for p in alone[v]]
