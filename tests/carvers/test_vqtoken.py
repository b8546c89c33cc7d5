import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pipeline import carvers
from pipeline.types import CarvedTokens, VisualTokens
from tests.carvers.inputs import make_tokens


def carve(tokens: VisualTokens, **options: object) -> list[CarvedTokens]:
    return carvers.build("vqtoken", options).carve(tokens)


def blobs(
    num_blobs: int, grid: tuple[int, int], *, seed: int = 0, noise: float = 0.3
) -> VisualTokens:
    """Tokens scattered around some directions, with lengths that differ."""
    tokens = make_tokens([], grid=grid, width=12, batch=2, seed=seed)
    generator = torch.Generator().manual_seed(seed + 50)
    centres = 3 * torch.randn(num_blobs, 12, generator=generator)
    which = torch.randint(0, num_blobs, tokens.features.shape[:2], generator=generator)
    lengths = 1 + torch.rand(*which.shape, 1, generator=generator)
    features = lengths * (centres[which] + noise * tokens.features)
    return VisualTokens(features=features, grid=grid)


def unit(rows: Tensor) -> Tensor:
    return torch.stack([row / row.norm() for row in rows])


def assign(rows: Tensor, centroids: Tensor) -> list[int]:
    """Return for each row the first centroid of the smallest one minus cosine."""
    distances = [
        [1 - torch.cosine_similarity(row, c, dim=0).item() for c in centroids] for row in rows
    ]
    return [row.index(min(row)) for row in distances]


def k_means(rows: Tensor, starts: list[int]) -> tuple[list[int], Tensor]:
    centroids = rows[starts].clone()
    for _ in range(100):
        labels = assign(rows, centroids)
        moved = centroids.clone()
        for k in set(labels):
            moved[k] = rows[[i for i, label in enumerate(labels) if label == k]].mean(dim=0)
        if (moved - centroids).norm() < 1e-4:
            break
        centroids = moved
    return labels, centroids


def assert_clusters(result: CarvedTokens, labels: list[int], averaged: Tensor) -> None:
    """The result holds the mean of each cluster at its middle member, in position order."""
    expected = {}
    for k in set(labels):
        members = [i for i, label in enumerate(labels) if label == k]
        position = members[(len(members) - 1) // 2]
        expected[position] = (averaged[members].mean(dim=0), len(members))
    assert result.positions.tolist() == sorted(expected)
    assert result.sizes.tolist() == [expected[p][1] for p in sorted(expected)]
    means = torch.stack([expected[p][0] for p in sorted(expected)])
    assert_close(result.features.double(), means, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("num_blobs", "grid", "keep"),
    [(5, (5, 7), 9), (40, (6, 8), 12), (3, (4, 9), 3), (9, (1, 20), 1)],
)
def test_the_default_equals_k_means_from_the_farthest_tokens(num_blobs, grid, keep):
    tokens = blobs(num_blobs, grid)

    results = carve(tokens, keep_tokens=keep)

    for features, result in zip(tokens.features.double(), results, strict=True):
        rows = unit(features)
        starts = [int((rows - rows.mean(dim=0)).norm(dim=1).argmin())]
        while len(starts) < keep:
            nearest = [min(1 - float(rows[i] @ rows[s]) for s in starts) for i in range(len(rows))]
            starts.append(nearest.index(max(nearest)))
        labels, _ = k_means(rows, starts)
        assert_clusters(result, labels, features)


def drawn_k_means(rows: Tensor, count: int, generator: torch.Generator) -> tuple[list[int], Tensor]:
    starts = [int(torch.randint(0, len(rows), (1,), generator=generator))]
    while len(starts) < count:
        nearest = torch.stack([torch.cdist(rows, rows[[s]])[:, 0] for s in starts]).amin(dim=0)
        starts.append(int(torch.multinomial(nearest**2 + 1e-6, 1, generator=generator)))
    return k_means(rows, starts)


def elbow_by_the_text(rows: Tensor, max_clusters: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    distortions = []
    for count in range(12, max_clusters + 1):
        labels, centroids = drawn_k_means(rows, count, generator)
        distortions.append(sum((rows[i] - centroids[k]).norm() ** 2 for i, k in enumerate(labels)))
    bends = [
        distortions[i] - 2 * distortions[i + 1] + distortions[i + 2]
        for i in range(len(distortions) - 2)
    ]
    count = max(bends.index(max(bends)) + 2 + 2, 12)
    return drawn_k_means(rows, count, generator)[0]


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
)
def test_the_elbow_form_equals_the_published_rule_with_the_same_draws(seed):
    tokens = blobs(17, (5, 8), seed=seed)

    results = carve(tokens, form="elbow", keep_ratio=0.9, max_clusters=24, seed=seed)

    for features, result in zip(tokens.features, results, strict=True):
        rows = unit(features)
        assert_clusters(result, elbow_by_the_text(rows, 24, seed), rows.double())


def test_the_elbow_form_never_finds_more_clusters_than_its_bounds():
    tokens = blobs(30, (6, 8))
    for keep, max_clusters, most in [(5, 32, 5), (13, 32, 13), (14, 32, 14), (40, 12, 12)]:
        results = carve(tokens, form="elbow", keep_tokens=keep, max_clusters=max_clusters)

        assert all(1 < len(result.positions) <= most for result in results)


def test_the_seed_chooses_the_draws_of_the_elbow_form_and_nothing_else_does():
    tokens = make_tokens([], grid=(5, 8), batch=1)

    first = carve(tokens, form="elbow", keep_tokens=30, seed=3)[0]
    again = carve(tokens, form="elbow", keep_tokens=30, seed=3)[0]
    other = carve(tokens, form="elbow", keep_tokens=30, seed=4)[0]

    assert torch.equal(first.features, again.features)
    assert first.positions.tolist() != other.positions.tolist()


def test_the_elbow_form_does_not_move_the_global_random_state():
    state = torch.get_rng_state()

    carve(make_tokens([], grid=(5, 8)), form="elbow", keep_tokens=30)

    assert torch.equal(torch.get_rng_state(), state)


def test_directions_are_clustered_and_lengths_averaged():
    features = torch.tensor([[1.0, 0.0], [0.0, 2.0], [9.0, 0.0], [0.0, 4.0], [5.0, 0.0]])[None]

    result = carve(VisualTokens(features=features, grid=(1, 5)), keep_tokens=2)[0]

    assert result.positions.tolist() == [1, 2]
    assert_close(result.features, torch.tensor([[0.0, 3.0], [5.0, 0.0]]))
    assert result.sizes.tolist() == [2.0, 3.0]
    assert result.ranks.tolist() == [1, 0]


def test_the_elbow_form_averages_unit_vectors():
    tokens = blobs(20, (5, 8))

    for result in carve(tokens, form="elbow", keep_tokens=30):
        assert (result.features.norm(dim=1) <= 1 + 1e-6).all()


@pytest.mark.parametrize("form", ["fixed", "elbow"])
def test_fewer_distinct_tokens_than_clusters_give_one_token_each(form):
    tokens = make_tokens([], grid=(5, 8), batch=1)
    repeated = VisualTokens(features=tokens.features[:, torch.arange(40) % 4], grid=(5, 8))

    result = carve(repeated, form=form, keep_tokens=15)[0]

    assert len(result.positions) == 4
    assert (result.positions % 4).unique().tolist() == [0, 1, 2, 3]
    assert result.sizes.tolist() == [10.0] * 4


@pytest.mark.parametrize("form", ["fixed", "elbow"])
def test_zero_tokens_are_clustered_with_something(form):
    tokens = blobs(6, (5, 8))
    tokens.features[:, ::3] = 0.0

    for result in carve(tokens, form=form, keep_tokens=14):
        assert result.features.isfinite().all()
        assert result.sizes.sum() == 40


@pytest.mark.parametrize("form", ["fixed", "elbow"])
def test_all_frames_of_a_clip_share_one_codebook(form):
    frame = blobs(5, (3, 4)).features
    clip = VisualTokens(features=torch.cat([frame] * 3, dim=1), grid=(3, 4), num_views=3)

    for result in carve(clip, form=form, keep_tokens=5):
        assert (result.sizes % 3 == 0).all()


def test_an_image_that_stands_still_early_is_not_moved_by_one_that_goes_on():
    slow, quick = make_tokens([], grid=(12, 12), width=3, batch=1), blobs(3, (12, 12))
    features = torch.cat([slow.features, quick.features[:1, :, :3]])

    together = carve(VisualTokens(features=features, grid=(12, 12)), keep_tokens=6)
    alone = carve(VisualTokens(features=features[1:], grid=(12, 12)), keep_tokens=6)[0]

    assert torch.equal(together[1].features, alone.features)
    assert torch.equal(together[1].positions, alone.positions)
