import pytest
import torch

from pipeline import codecs
from pipeline.errors import NonFiniteError


def test_a_value_is_stored_as_little_endian_float16():
    packed = codecs.build("fp16").pack(torch.tensor([[1.0, -2.5]]))

    assert packed.tokens == bytes.fromhex("003c 00c1")
    assert packed.aux == b""


def test_features_of_a_float16_encoder_come_back_exactly():
    codec = codecs.build("fp16")
    rows = torch.randn(8, 96, generator=torch.Generator().manual_seed(0)).half()

    assert torch.equal(codec.unpack([codec.pack(rows)], dtype=torch.float16), rows)


@pytest.mark.parametrize("size", [1e-30, 1e-9, 3e-8, 1e-5, 6e-5, 1.0, 65504.0])
def test_tokens_of_any_size_stay_within_the_error_promised(size):
    codec = codecs.build("fp16")
    rows = torch.rand(64, 96, generator=torch.Generator().manual_seed(0)) * size

    error = (codec.unpack([codec.pack(rows)]).double() - rows.double()).abs().amax(dim=1)

    largest = rows.double().abs().amax(dim=1).clamp(min=codec.smallest)
    assert (error <= codec.max_error * largest).all()


def test_the_error_promised_is_nearly_reached():
    codec = codecs.build("fp16")
    half_way = torch.tensor([[1 + 2.0**-11]])

    error = (codec.unpack([codec.pack(half_way)]) - half_way).abs().item()

    assert error > 0.99 * codec.max_error


def test_a_value_beyond_its_range_is_refused_and_the_wider_codecs_are_named():
    rows = torch.zeros(3, 8)
    rows[2, 5] = -70000.0

    with pytest.raises(
        NonFiniteError,
        match=r"token 2, feature 5 is -70000\.0, too large .* use codec bf16 or int8",
    ):
        codecs.build("fp16").pack(rows)


def test_the_largest_value_is_stored():
    codec = codecs.build("fp16")

    unpacked = codec.unpack([codec.pack(torch.tensor([[65504.0, -65519.0]]))])

    assert unpacked.tolist() == [[65504.0, -65504.0]]
