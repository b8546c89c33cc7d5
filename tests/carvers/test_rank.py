"""The effective rank of an image's tokens, against a plain singular value decomposition."""

import pytest
import torch
from torch.testing import assert_close

from pipeline.carvers._rank import effective_rank, effective_rank_batched


def by_svd(features: torch.Tensor) -> float:
    rows = features.double()
    singular = torch.linalg.svdvals(rows - rows.mean(dim=0))
    shares = singular[singular > 1e-7 * singular[0]] / singular.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


both_forms = pytest.mark.parametrize("rank", [effective_rank, effective_rank_batched])


def decaying(batch: int, num_tokens: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_tokens + width)
    inner = min(num_tokens, width)
    scales = torch.arange(1, inner + 1) ** -0.7
    left = torch.randn(batch, num_tokens, inner, generator=generator) * scales
    right = torch.randn(batch, inner, width, generator=generator)
    return (left @ right + 4 * torch.randn(width, generator=generator)).to(dtype)


@both_forms
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(30, 64), (64, 30), (24, 24), (2, 9)])
def test_it_is_the_exponential_of_the_entropy_of_the_singular_values(rank, shape, dtype):
    features = decaying(3, *shape, dtype)

    ranks = rank(features)

    assert ranks.dtype == torch.float32
    expected = torch.tensor([by_svd(image) for image in features])
    assert_close(ranks, expected, rtol=1e-5, atol=1e-5)


@both_forms
def test_equal_singular_values_count_fully(rank):
    # Rows +-e_i: the mean is 0 and all 4 singular values are sqrt(2).
    features = torch.cat([torch.eye(4), -torch.eye(4)])[None]

    assert_close(rank(features), torch.tensor([4.0]))


@both_forms
@pytest.mark.parametrize("fill", [0.0, 0.1, -3.0, 4096.0, 3e38])
def test_equal_tokens_have_rank_one(rank, fill):
    assert_close(rank(torch.full((2, 35, 40), fill)), torch.ones(2))
    assert_close(rank(torch.full((2, 35, 8), fill)), torch.ones(2))


@both_forms
def test_scale_and_shift_do_not_matter(rank):
    features = decaying(2, 20, 12, torch.float32).double()

    assert_close(rank(features * 1e6 + 3), rank(features), rtol=1e-6, atol=0)


@both_forms
def test_an_image_does_not_depend_on_its_batch_mates(rank):
    features = decaying(3, 40, 24, torch.float32)

    alone = torch.cat([rank(image[None]) for image in features])

    assert torch.equal(alone, rank(features))


def test_the_number_of_threads_does_not_matter():
    features = decaying(4, 40, 24, torch.float32)
    threads = torch.get_num_threads()
    expected = effective_rank(features)
    torch.set_num_threads(3)
    try:
        assert torch.equal(effective_rank(features), expected)
    finally:
        torch.set_num_threads(threads)


def test_a_large_batch_is_computed_in_parts_without_a_trace(monkeypatch):
    features = decaying(5, 16, 24, torch.float32)
    expected = effective_rank_batched(features)

    monkeypatch.setattr("pipeline.carvers._image_pool._CHUNK_BYTES", 2 * 8 * 16 * 24)

    assert torch.equal(effective_rank_batched(features), expected)
