"""Greedy coverage, against a loop over exact fractions."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from pipeline.carvers import _greedy, _similarity


def literal(similarities: Tensor, num_picks: int, weights: Tensor | None = None) -> list[int]:
    """Pick for one image, gain by gain, without any rounding before the weight."""
    rows = [[Fraction(value) for value in row] for row in similarities.tolist()]
    tokens = range(len(rows))
    factors = [1.0] * len(rows) if weights is None else weights.tolist()
    covered = [Fraction(0)] * len(rows)
    picks: list[int] = []
    for _ in range(num_picks):
        gains = {
            j: factors[j] * float(sum(max(Fraction(0), rows[i][j] - covered[i]) for i in tokens))
            for j in tokens
            if j not in picks
        }
        chosen = max(gains, key=lambda j: (gains[j], -j))
        picks.append(chosen)
        covered = [max(covered[i], rows[i][chosen]) for i in tokens]
    return picks


def cosines(batch: int, num_tokens: int, seed: int = 0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(batch, num_tokens, 6, generator=generator) + shift
    return _similarity.cosines(features)


@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("num_tokens", [1, 2, 24, 37])
@pytest.mark.parametrize("weighted", [False, True])
def test_each_pick_has_the_largest_gain(num_tokens, shift, weighted):
    similarities = cosines(2, num_tokens, shift=shift)
    weights = torch.rand(2, num_tokens, generator=torch.Generator().manual_seed(1))

    picks = _greedy.coverage(similarities, num_tokens // 2 + 1, weights if weighted else None)

    for image in range(2):
        factors = weights[image] if weighted else None
        expected = literal(similarities[image], num_tokens // 2 + 1, factors)
        assert picks[image].tolist() == expected


def test_columns_are_candidates_and_rows_are_to_be_covered():
    # Column 1 covers row 0 by 0.5 and row 2 by 0.75; then only column 2 covers row 1.
    similarities = torch.tensor([[[0.1, 0.5, 0.0], [0.0, 0.0, 0.25], [0.1, 0.75, 0.0]]])

    assert _greedy.coverage(similarities, 3).tolist() == [[1, 2, 0]]


def test_once_all_is_covered_the_lower_positions_follow():
    similarities = cosines(1, 6, shift=1.0)[:, torch.arange(30) % 6][:, :, torch.arange(30) % 6]

    picks = _greedy.coverage(similarities, 20)[0].tolist()

    assert sorted(picks[:6]) == list(range(6))
    assert picks[6:] == list(range(6, 20))


def test_sums_of_values_of_any_size_leave_no_trace_of_rounding():
    # Values of 1 to 1e-13, whose plain sums would leave noise where all gains are 0.
    generator = torch.Generator().manual_seed(4)
    similarities = torch.exp(-30 * torch.rand(1, 8, 8, generator=generator))
    copies = torch.arange(40) % 8

    picks = _greedy.coverage(similarities[:, copies][:, :, copies], 40)[0].tolist()

    assert sorted(picks[:8]) == list(range(8))
    assert picks[8:] == list(range(8, 40))


@pytest.mark.parametrize("scale", [2.0**-140, 2.0**-30, 2.0**60])
def test_the_scale_of_the_similarities_does_not_matter(scale):
    # Of 8 bits, so that they survive as subnormal numbers.
    similarities = (cosines(2, 20) * 256).round() / 256

    picks = _greedy.coverage(similarities * scale, 9)

    assert torch.equal(picks, _greedy.coverage(similarities, 9))


def test_nothing_to_cover_picks_from_the_front():
    assert _greedy.coverage(torch.zeros(2, 5, 5), 3).tolist() == [[0, 1, 2]] * 2


def test_parts_and_batch_mates_leave_no_trace(monkeypatch):
    similarities = cosines(3, 40, shift=0.5)
    expected = _greedy.coverage(similarities, 15)

    monkeypatch.setattr(_greedy, "_CHUNK_VALUES", 3 * 40)  # three rows at once
    parts = _greedy.coverage(similarities, 15)

    assert torch.equal(parts, expected)
    for image in range(3):
        assert torch.equal(_greedy.coverage(similarities[[image]], 15)[0], expected[image])
