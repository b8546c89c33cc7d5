import pytest
import torch

from pipeline import codecs
from pipeline.errors import NonFiniteError


def test_a_value_is_stored_as_the_upper_half_of_its_float32():
    packed = codecs.build("bf16").pack(torch.tensor([[1.0, -2.5]]))

    assert packed.tokens == bytes.fromhex("803f 20c0")
    assert packed.aux == b""


def test_features_of_a_bfloat16_encoder_come_back_exactly():
    codec = codecs.build("bf16")
    rows = torch.randn(8, 96, generator=torch.Generator().manual_seed(0)).bfloat16()

    assert torch.equal(codec.unpack([codec.pack(rows)], dtype=torch.bfloat16), rows)


@pytest.mark.parametrize("size", [1e-42, 1e-38, 1e-30, 1.0, 1e30, 3.3e38])
def test_tokens_of_any_size_stay_within_the_error_promised(size):
    codec = codecs.build("bf16")
    rows = torch.rand(64, 96, generator=torch.Generator().manual_seed(0)) * size

    error = (codec.unpack([codec.pack(rows)]).double() - rows.double()).abs().amax(dim=1)

    largest = rows.double().abs().amax(dim=1).clamp(min=codec.smallest)
    assert (error <= codec.max_error * largest).all()


def test_the_error_promised_is_nearly_reached():
    codec = codecs.build("bf16")
    half_way = torch.tensor([[1 + 2.0**-8]])

    error = (codec.unpack([codec.pack(half_way)]) - half_way).abs().item()

    assert error > 0.99 * codec.max_error


def test_a_value_that_would_round_to_infinity_is_refused():
    with pytest.raises(NonFiniteError, match=r"too large for codec 'bf16'; use codec fp32"):
        codecs.build("bf16").pack(torch.tensor([[0.0, 3.4e38]]))
