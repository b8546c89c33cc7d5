import dataclasses
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline import codecs
from pipeline.codecs._rotation import block_size, hadamard, signs
from pipeline.errors import CacheFormatError, ConfigError, NonFiniteError
from tests.codecs.inputs import gaussian, relative_error, with_outlier_channels


def round_trip(rows: Tensor) -> Tensor:
    codec = codecs.build("int8")
    return codec.unpack([codec.pack(rows)])


def test_a_token_of_odd_width_is_stored_as_plain_int8():
    packed = codecs.build("int8").pack(torch.tensor([[127.0, -64.0, 0.25]]))

    assert packed.tokens == struct.pack("<3b", 127, -64, 0)
    assert struct.unpack("<f", packed.aux) == pytest.approx((-1.0,))


def test_a_token_of_one_outlier_is_spread_over_its_block():
    packed = codecs.build("int8").pack(torch.tensor([[8.0, 0.0, 0.0, 0.0]]))

    assert {abs(code) for code in struct.unpack("<4b", packed.tokens)} == {127}
    assert struct.unpack("<f", packed.aux) == pytest.approx((8 / 4 / 127,))


def test_stored_bytes_can_be_read_from_the_documented_formula_alone():
    rows = with_outlier_channels(4, 12, 20.0)
    codec = codecs.build("int8", {"seed": 9})
    packed = codec.pack(rows)
    matrix = torch.tensor([[1.0]])
    matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)

    codes = torch.tensor(struct.unpack("<48b", packed.tokens)).float().view(4, 3, 4)
    scales = torch.tensor(struct.unpack("<4f", packed.aux)).unsqueeze(1)
    mixed = (codes @ matrix).view(4, 12) * signs(9, 12).squeeze(1)
    expected = torch.where(scales > 0, mixed, codes.view(4, 12)) * scales.abs()

    assert torch.equal(codec.unpack([packed]), expected)
    assert (scales > 0).any()


@pytest.mark.parametrize("width", [1024, 1152, 3584, 4096])
def test_gaussian_features_lose_less_than_one_percent(width):
    rows = gaussian(32, width)

    assert relative_error(rows, round_trip(rows)) < 0.009


@pytest.mark.parametrize("width", [1024, 1152, 3584, 4096])
@pytest.mark.parametrize("factor", [10.0, 50.0])
def test_outlier_channels_cost_no_accuracy(width, factor):
    rows = with_outlier_channels(32, width, factor)
    scale = rows.abs().amax(dim=1, keepdim=True) / 127
    plain = (rows / scale).round() * scale

    error = relative_error(rows, round_trip(rows))

    assert error < 0.0125
    assert error < relative_error(rows, plain) / 2.5


def test_a_constant_token_is_stored_almost_exactly():
    rows = torch.full((1, 1024), 0.3)

    torch.testing.assert_close(round_trip(rows), rows, rtol=1e-6, atol=0)


@settings(max_examples=80, deadline=None)
@given(
    width=st.sampled_from([1, 12, 64, 1024]),
    exponent=st.integers(-28, 28),
    outlier=st.floats(1, 1e6),
    seed=st.integers(0, 1000),
)
def test_the_root_mean_square_error_is_a_254th_of_the_largest_value(width, exponent, outlier, seed):
    rows = torch.randn(4, width, generator=torch.Generator().manual_seed(seed))
    rows[:, seed % width] *= outlier
    rows *= 10.0**exponent

    error = (round_trip(rows).double() - rows.double()).square().mean(dim=1).sqrt()

    largest = rows.double().abs().amax(dim=1).clamp(min=codecs.load("int8").smallest)
    assert (error <= 1.01 / 254 * largest).all()


@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e30, 1e35])
def test_tokens_of_any_size_stay_within_the_error_promised(size):
    codec = codecs.build("int8")
    rows = gaussian(8, 96).clamp(-1, 1) * size

    error = (round_trip(rows).double() - rows.double()).abs().amax(dim=1)

    largest = rows.double().abs().amax(dim=1).clamp(min=codec.smallest)
    assert (error <= codec.max_error * largest).all()


def test_a_value_its_sums_could_not_hold_is_refused():
    with pytest.raises(NonFiniteError, match=r"too large for codec 'int8'; .* use codec fp32"):
        codecs.build("int8").pack(torch.full((1, 1024), 1e37))


def test_another_seed_stores_other_bytes_of_the_same_accuracy():
    rows = with_outlier_channels(8, 1024, 50.0)
    codec = codecs.build("int8", {"seed": 7})

    packed = codec.pack(rows)

    assert packed.tokens != codecs.build("int8").pack(rows).tokens
    assert relative_error(rows, codec.unpack([packed])) < 0.009


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, "0"])
def test_a_seed_that_is_no_64_bit_count_is_refused(seed):
    with pytest.raises(ConfigError, match="seed"):
        codecs.build("int8", {"seed": seed})


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf")])
def test_a_damaged_scale_is_refused_with_its_token(scale):
    codec = codecs.build("int8")
    packed = codec.pack(gaussian(3, 8))
    damaged = dataclasses.replace(packed, aux=packed.aux[:8] + struct.pack("<f", scale))

    with pytest.raises(CacheFormatError, match=rf"scale of token 5 \(of 6 joined\) is {scale}"):
        codec.unpack([packed, damaged])


def test_the_bytes_of_version_1_never_change():
    rows = torch.tensor([[0.5, -1.0, 30.0, 2.0, 0.25, -0.125, 1.5, 0.0]])

    packed = codecs.build("int8", {"seed": 3}).pack(rows)

    assert packed.tokens.hex() == "a48d6a709681727a"
    assert packed.aux.hex() == "2693093d"


@pytest.mark.parametrize(
    ("width", "block"),
    [(1, 1), (1151, 1), (1152, 128), (3584, 512), (1024, 1024), (4096, 1024), (5120, 1024)],
)
def test_features_are_mixed_in_blocks_of_the_power_of_two_in_the_width(width, block):
    assert block_size(width) == block


def test_signs_follow_the_published_generator():
    # The first outputs of SplitMix64 seeded with 1234567, from its reference implementation.
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]

    expected = [-1.0 if output >> 63 else 1.0 for output in published]

    assert signs(1234567, 5).squeeze(1).tolist() == expected


@pytest.mark.parametrize("block", [1, 2, 64])
def test_mixing_twice_multiplies_by_the_block(block):
    values = torch.arange(128.0 * 3).view(128, 3)

    assert torch.equal(hadamard(hadamard(values, block), block), values * block)


@pytest.mark.parametrize("width", [1024, 1152, 3072])
def test_a_token_is_rotated_to_the_same_bits_alone_and_among_many(width):
    block = block_size(width)
    values = torch.randn(width, 100, generator=torch.Generator().manual_seed(0))

    alone = [hadamard(column.contiguous(), block) for column in values.split(1, dim=1)]

    assert torch.equal(torch.cat(alone, dim=1), hadamard(values, block))
