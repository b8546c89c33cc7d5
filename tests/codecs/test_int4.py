import dataclasses
import struct

import pytest
import torch

from pipeline import codecs
from pipeline.errors import CacheFormatError, ConfigError, NonFiniteError
from tests.codecs.inputs import (
    error_of_levels,
    gaussian,
    lloyd_max,
    relative_error,
    with_outlier_channels,
)

ROTATED = ["int2", "int3", "int4"]
TYPICAL = {"int2": 0.345, "int3": 0.188, "int4": 0.099}


@pytest.mark.parametrize("name", ROTATED)
def test_the_levels_are_lloyd_max_levels_of_a_gaussian(name):
    codec = codecs.load(name)
    levels = [-level for level in reversed(codec.levels)] + list(codec.levels)

    best, least_error = lloyd_max(len(levels))

    assert len(levels) == 2**codec.bits
    for level, ideal in zip(levels, best, strict=True):
        assert level / codec.per_sigma == pytest.approx(ideal, abs=0.02)
    assert error_of_levels(levels, codec.per_sigma) < 1.001 * least_error


@pytest.mark.parametrize("name", ROTATED)
@pytest.mark.parametrize("factor", [1.0, 10.0, 100.0])
def test_gaussian_features_with_outlier_channels_keep_the_error_documented(name, factor):
    codec = codecs.build(name)
    rows = with_outlier_channels(32, 1024, factor)

    assert relative_error(rows, codec.unpack([codec.pack(rows)])) < TYPICAL[name]


@pytest.mark.parametrize("name", ROTATED)
@pytest.mark.parametrize("width", [1, 5, 48, 1024])
def test_tokens_of_one_value_come_back_almost_exactly(name, width):
    codec = codecs.build(name)
    rows = torch.tensor([[3.7], [-1e-20], [2e30]]).expand(-1, width)

    torch.testing.assert_close(codec.unpack([codec.pack(rows)]), rows, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ROTATED)
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e30, 1e35])
def test_tokens_of_any_size_stay_within_the_error_promised(name, size):
    codec = codecs.build(name)
    rows = gaussian(8, 96).clamp(-1, 1) * size

    error = (codec.unpack([codec.pack(rows)]).double() - rows.double()).abs().amax(dim=1)

    largest = rows.double().abs().amax(dim=1).clamp(min=codec.smallest)
    assert (error <= codec.max_error * largest).all()


@pytest.mark.parametrize(("name", "between"), [("int2", 0.65), ("int3", 0.81), ("int4", 0.88)])
def test_a_token_whose_rotated_form_would_break_the_promise_is_stored_plain(name, between):
    # Half way between two plain levels the rotated form has the smaller squared error, but some
    # value of so many that are nearly as large as the largest is far off.
    rows = gaussian(1, 8192).sign() * between
    rows[0, 0] = 1.0
    codec = codecs.build(name)

    packed = codec.pack(rows)

    (scale,) = struct.unpack("<f", packed.aux)
    assert scale < 0
    assert relative_error(rows, codec.unpack([packed])) > 1.2 * TYPICAL[name]


def test_a_value_its_sums_could_not_hold_is_refused():
    with pytest.raises(NonFiniteError, match=r"too large for codec 'int4'; .* use codec fp32"):
        codecs.build("int4").pack(torch.full((1, 1024), 1e37))


def test_another_seed_stores_other_bytes_of_the_same_accuracy():
    rows = with_outlier_channels(8, 1024, 50.0)
    codec = codecs.build("int4", {"seed": 7})

    packed = codec.pack(rows)

    assert packed.tokens != codecs.build("int4").pack(rows).tokens
    assert relative_error(rows, codec.unpack([packed])) < TYPICAL["int4"]


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, "0"])
def test_a_seed_that_is_no_64_bit_count_is_refused(seed):
    with pytest.raises(ConfigError, match="seed"):
        codecs.build("int4", {"seed": seed})


@pytest.mark.parametrize("name", ROTATED)
@pytest.mark.parametrize("width", [1, 2, 3, 5, 8, 13, 1151])
def test_only_a_width_that_leaves_bits_over_needs_a_head(name, width):
    codec = codecs.build(name)
    codes_in_whole_bytes = {"int2": 4, "int3": 8, "int4": 2}[name]

    packed = codec.pack(gaussian(3, width))

    padding = -width % codes_in_whole_bytes
    assert packed.head == (bytes([padding]) if padding else b"")
    assert codec.unpack([packed]).shape == (3, width)


@pytest.mark.parametrize("name", ROTATED)
@pytest.mark.parametrize("head", [b"\0", b"\x08", b"\xff", b"\1\1"])
def test_a_head_that_no_width_gives_is_refused(name, head):
    codec = codecs.build(name)
    damaged = dataclasses.replace(codec.pack(gaussian(3, 8)), head=head)

    with pytest.raises(CacheFormatError, match=r"image 0 has a head of .* one that holds 1 to"):
        codec.unpack([damaged])


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_a_damaged_scale_is_refused_with_its_token(scale):
    codec = codecs.build("int4")
    packed = codec.pack(gaussian(3, 8))
    damaged = dataclasses.replace(packed, aux=packed.aux[:8] + struct.pack("<f", scale))

    with pytest.raises(CacheFormatError, match=rf"scale of token 5 \(of 6 joined\) is {scale}"):
        codec.unpack([packed, damaged])


@pytest.mark.parametrize(
    ("name", "tokens", "aux", "head"),
    [
        ("int4", "88877ffc2b86", "3bb193bec64eecbc", ""),
        ("int3", "0c331d1e0d2b", "a38baebee9a20bbd", "02"),
        ("int2", "22111e13", "d98aa43ff0391a3e", "02"),
    ],
)
def test_the_bytes_of_version_1_never_change(name, tokens, aux, head):
    rows = torch.tensor([[0.5, -1.0, 30.0, 2.0, 0.25, -0.125], [1.5, 1.0, -0.5, 3.0, -2.0, 0.25]])

    packed = codecs.build(name, {"seed": 3}).pack(rows)

    assert packed.tokens.hex() == tokens
    assert packed.aux.hex() == aux
    assert packed.head.hex() == head
