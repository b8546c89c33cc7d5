import pytest
import torch
from torch.testing import assert_close

from pipeline import carvers
from pipeline.types import CarvedTokens, VisualTokens
from tests.carvers.inputs import make_tokens
from tests.golden import golden_cases

PORT = golden_cases("vispruner")


def carve(tokens: VisualTokens, **options: object) -> list[CarvedTokens]:
    return carvers.build("vispruner", options).carve(tokens)


def with_attention(features: torch.Tensor, attention: list[float] | torch.Tensor) -> VisualTokens:
    attention = torch.as_tensor(attention, dtype=torch.float32)
    return VisualTokens(
        features=features[None],
        grid=(1, len(features)),
        signals={"cls_attention": attention[None]},
    )


def thinned(features, listed: list[int], wanted: int, *, original: bool) -> list[int]:
    """The rounds, one token at a time, as the method's description has them."""
    features = features.double()

    def cosine(i: int, j: int) -> float:
        return float(features[i] @ features[j] / features[i].norm() / features[j].norm())

    while len(listed) > wanted:
        carried = listed[-1:] if original and len(listed) % 2 else []
        pairs = listed[: len(listed) - len(carried)]
        left, right = pairs[::2], pairs[1::2]
        closest = {i: max(cosine(i, j) for j in right) for i in left}
        by_likeness = sorted(left, key=lambda i: -closest[i])
        gone = min(8, len(listed) // 2, len(listed) - wanted)
        listed = by_likeness[gone:] + right + carried
        listed = listed if original else sorted(listed)
    return listed


@pytest.mark.parametrize("case", PORT, ids=lambda case: case.name)
def test_the_port_equals_the_released_code(case):
    tokens = with_attention(case.inputs["features"], case.inputs["attention"])

    result = carve(
        tokens,
        version="port",
        keep_tokens=case.options["keep_tokens"],
        important_share=case.options["important_share"],
    )[0]

    assert result.positions.tolist() == case.expected["positions"].tolist()
    assert torch.equal(result.features, case.expected["features"])
    assert result.sizes.eq(1).all()


@pytest.mark.parametrize("version", ["original", "port"])
@pytest.mark.parametrize(
    ("num_tokens", "width", "keep"),
    [(64, 24, 32), (64, 24, 8), (63, 40, 20), (61, 5, 13), (50, 30, 49), (35, 12, 4), (9, 4, 2)],
)
def test_it_equals_a_slow_loop(version, num_tokens, width, keep):
    tokens = make_tokens(["cls_attention"], batch=2, grid=(1, num_tokens), width=width)
    important = int(keep / 2) if version == "original" else min(keep - 1, round(keep / 2))

    results = carve(tokens, version=version, keep_tokens=keep)

    for image, result in enumerate(results):
        attention = tokens.signals["cls_attention"][image].tolist()
        order = sorted(range(num_tokens), key=lambda i: -attention[i])
        rest = order[important:] if version == "original" else sorted(order[important:])
        diverse = thinned(
            tokens.features[image], rest, keep - important, original=version == "original"
        )
        assert result.positions.tolist() == sorted(order[:important] + diverse)


def test_of_two_equal_tokens_the_one_of_higher_attention_goes_and_the_odd_one_out_stays():
    # The four others in falling attention: 3 (= 2), 2, 0, 1; then a fifth, 5, that has no partner.
    features = torch.eye(6)
    features[3] = features[2]
    features[5] = features[0]
    tokens = with_attention(features, [0.3, 0.2, 0.4, 0.5, 0.9, 0.1])

    result = carve(tokens, keep_tokens=5, important_share=0.2)[0]

    assert result.positions.tolist() == [0, 1, 2, 4, 5]


def test_the_two_versions_keep_different_tokens():
    tokens = make_tokens(["cls_attention"], batch=1, grid=(12, 12), width=32)

    original = carve(tokens, keep_tokens=36)[0].positions
    port = carve(tokens, keep_tokens=36, version="port")[0].positions

    assert set(original.tolist()) != set(port.tolist())


@pytest.mark.parametrize(("version", "share"), [("original", 1.0), ("original", 0.0)])
def test_the_share_may_leave_one_part_empty(version, share):
    tokens = make_tokens(["cls_attention"], batch=1, grid=(4, 5))
    order = tokens.signals["cls_attention"][0].argsort(descending=True).tolist()

    result = carve(tokens, version=version, important_share=share, keep_tokens=6)[0]

    assert len(result.positions) == 6
    assert (set(result.positions.tolist()) == set(order[:6])) == (share == 1.0)


def test_the_port_leaves_one_token_to_diversity_but_not_the_only_one():
    tokens = with_attention(torch.eye(4), [0.1, 0.2, 0.3, 0.4])

    one = carve(tokens, version="port", important_share=1.0, keep_tokens=1)[0]
    two = carve(tokens, version="port", important_share=1.0, keep_tokens=2)[0]

    # The rest is 0, 1, 2: token 0 goes, then token 1, each before its equal to the right.
    assert one.positions.tolist() == [3]
    assert two.positions.tolist() == [2, 3]


def test_every_prefix_holds_important_and_diverse_tokens_in_turns():
    tokens = with_attention(torch.eye(8), [0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])

    result = carve(tokens, keep_tokens=8)[0]

    assert result.positions[result.ranks.argsort()].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_received_attention_takes_the_place_of_the_class_token():
    tokens = make_tokens(["cls_attention"], batch=1, grid=(5, 6))
    received = VisualTokens(
        features=tokens.features,
        grid=tokens.grid,
        signals={"received_attention": tokens.signals["cls_attention"]},
    )

    expected = carve(tokens, keep_tokens=7)[0]
    result = carve(received, keep_tokens=7, attention="received_attention")[0]

    assert torch.equal(result.positions, expected.positions)


def test_each_view_is_pruned_by_itself():
    tokens = make_tokens(["cls_attention"], batch=1, grid=(4, 5), num_views=3)

    result = carve(tokens, keep_tokens=18)[0]

    for view in range(3):
        part = slice(20 * view, 20 * view + 20)
        alone = VisualTokens(
            features=tokens.features[:, part],
            grid=(4, 5),
            signals={"cls_attention": tokens.signals["cls_attention"][:, part]},
        )
        kept = result.positions[result.positions // 20 == view] - 20 * view
        assert_close(kept, carve(alone, keep_tokens=6)[0].positions)
