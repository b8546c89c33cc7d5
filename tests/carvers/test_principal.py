import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pipeline.carvers._principal import token_weights, token_weights_batched

both_forms = pytest.mark.parametrize("weigh", [token_weights, token_weights_batched])


def by_svd(values: Tensor, num_directions: int) -> Tensor:
    rows = values.double()
    left, singular, _ = torch.linalg.svd(rows - rows.mean(dim=1, keepdim=True), full_matrices=False)
    weights = torch.where(singular > 1e-7 * singular[0], left.abs(), 0)
    weights = torch.nn.functional.pad(weights, (0, num_directions))
    return weights[:, :num_directions].float()


def decaying(batch: int, num_tokens: int, width: int) -> Tensor:
    """Tokens whose singular values lie apart, so that each direction is well defined."""
    generator = torch.Generator().manual_seed(num_tokens + width)
    inner = min(num_tokens, width)
    left = torch.linalg.qr(torch.randn(batch, num_tokens, inner, generator=generator)).Q
    right = torch.randn(batch, inner, width, generator=generator)
    return (left * torch.arange(1, inner + 1) ** -0.5) @ right


@both_forms
@pytest.mark.parametrize(("num_tokens", "width", "count"), [(12, 30, 5), (30, 12, 5), (9, 4, 9)])
def test_it_equals_a_full_decomposition(weigh, num_tokens, width, count):
    values = decaying(3, num_tokens, width)

    weights = weigh(values, count)

    assert weights.dtype == torch.float32
    expected = torch.stack([by_svd(image, count) for image in values])
    assert_close(weights, expected, rtol=1e-4, atol=1e-6)


@both_forms
@pytest.mark.parametrize("width", [4, 40])
def test_directions_that_do_not_exist_have_no_weight(weigh, width):
    # Tokens of one direction, and tokens of none.
    steps = torch.arange(float(width)) * torch.arange(1.0, 10.0)[:, None]

    weights = weigh(torch.stack([steps, torch.full((9, width), 0.1)]), 3)

    assert_close(weights[0, :, 0].square().sum(), torch.tensor(1.0))
    assert weights[0, :, 1:].eq(0).all()
    assert weights[1].eq(0).all()


@both_forms
def test_an_image_does_not_depend_on_its_batch_mates(weigh):
    values = decaying(3, 20, 24)

    alone = torch.cat([weigh(image[None], 4) for image in values])

    assert torch.equal(alone, weigh(values, 4))


def test_a_large_batch_is_computed_in_parts_without_a_trace(monkeypatch):
    values = decaying(5, 16, 24)
    expected = token_weights_batched(values, 4)

    monkeypatch.setattr("pipeline.carvers._image_pool._CHUNK_BYTES", 2 * 8 * 16 * 24)

    assert torch.equal(token_weights_batched(values, 4), expected)
