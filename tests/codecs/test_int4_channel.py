import numpy as np
import pytest
import torch

from pipeline import codecs
from pipeline.errors import CacheFormatError, NonFiniteError
from tests.codecs.inputs import (
    flat_heads,
    gaussian,
    relative_error,
    stored_affine,
    stored_codes,
    stored_scales,
    with_outlier_channels,
)
from tests.golden import golden_cases

CHANNEL = ["int8_channel", "int4_channel"]
ONE_CLASS = [case for case in golden_cases("zipcache") if case.options["classes"] == "one"]


def test_what_is_stored_equals_the_published_code():
    (case,) = [case for case in ONE_CLASS if case.options["bits"] == 4]
    rows = flat_heads(case.inputs["value"])
    codec = codecs.build("int4_channel", {"scales": "float32"})

    packed = codec.pack(rows)

    minimum, step = stored_affine(packed)
    expected = case.expected
    assert packed.tokens == expected["value_codes"].numpy().tobytes()
    np.testing.assert_allclose(minimum, expected["value_minimum"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(step, expected["value_step"], rtol=1e-5, atol=1e-6)
    scale = expected["value_channel_scale"].flatten()
    np.testing.assert_allclose(stored_scales(packed.head), scale, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        codec.unpack([packed]), flat_heads(expected["value"]), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", CHANNEL)
def test_outlier_channels_cost_the_others_little(name):
    plain, outliers = gaussian(64, 256), with_outlier_channels(64, 256, 10.0)
    codec = codecs.build(name)

    errors = [relative_error(rows, codec.unpack([codec.pack(rows)])) for rows in (plain, outliers)]

    assert errors[1] < 1.5 * errors[0]
    assert errors[0] < {"int8_channel": 0.008, "int4_channel": 0.13}[name]


@pytest.mark.parametrize("name", CHANNEL)
def test_short_scales_cost_no_accuracy(name):
    rows = with_outlier_channels(64, 256, 10.0)

    short, full = (
        relative_error(rows, codec.unpack([codec.pack(rows)]))
        for codec in (codecs.build(name, {"scales": kind}) for kind in ("bfloat16", "float32"))
    )

    assert short == pytest.approx(full, rel=0.01)


@pytest.mark.parametrize("name", CHANNEL)
def test_a_channel_of_zeros_stays_so_and_harms_no_other(name):
    rows = gaussian(8, 64)
    rows[:, 5] = 0
    codec = codecs.build(name)

    unpacked = codec.unpack([codec.pack(rows)])

    assert (unpacked[:, 5] == 0).all()
    assert relative_error(rows, unpacked) < 0.15


@pytest.mark.parametrize("name", CHANNEL)
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-20, 1e20, 1e38])
def test_images_of_any_size_stay_within_the_error_promised(name, size):
    codec = codecs.build(name)
    rows = gaussian(8, 96).clamp(-1, 1) * size
    rows[3] *= 1e-3

    error = (codec.unpack([codec.pack(rows)]).double() - rows.double()).abs().max()

    assert error <= codec.max_error * rows.double().abs().max().clamp(min=codec.smallest)


@pytest.mark.parametrize("name", CHANNEL)
def test_the_error_promised_is_nearly_reached(name):
    codec = codecs.build(name)
    # One channel spans the token's range, the other lies half way between two levels.
    rows = torch.tensor([[1.0, -1.0, 1e-5, 1.0], [1.0, 1.0, 1.0, 1.0]])

    error = (codec.unpack([codec.pack(rows)]) - rows).abs().max()

    assert error > 0.8 * codec.max_error


def test_a_value_too_large_is_refused():
    with pytest.raises(NonFiniteError, match=r"too large for codec 'int8_channel'; its largest"):
        codecs.build("int8_channel").pack(torch.full((1, 4), 3e38))


@pytest.mark.parametrize(("part", "what"), [("head", "scales of channels"), ("aux", "minima")])
def test_damaged_numbers_are_refused(part, what):
    codec = codecs.build("int4_channel", {"scales": "float32"})
    packed = codec.pack(gaussian(2, 8))
    content = {"head": packed.head, "aux": packed.aux}
    content[part] = content[part][:4] + b"\0\0\x80\x7f" + content[part][8:]
    damaged = type(packed)(tokens=packed.tokens, num_tokens=2, **content)

    with pytest.raises(CacheFormatError, match=f"{what}.* hold inf, expected finite"):
        codec.unpack([damaged])


def test_scales_of_another_type_than_the_options_say_do_not_fit():
    packed = codecs.build("int4_channel", {"scales": "float32"}).pack(gaussian(2, 8))

    with pytest.raises(CacheFormatError, match="image 0 has 8 bytes of codes for 2 tokens"):
        codecs.build("int4_channel").unpack([packed])


def test_every_code_is_two_to_a_byte_the_second_half_above():
    packed = codecs.build("int4_channel").pack(torch.tensor([[-1.0, -0.6, 0.2, 1.0]]))

    codes = stored_codes(packed, 4, 4)[0].tolist()
    assert packed.tokens == bytes([codes[0] | codes[2] << 4, codes[1] | codes[3] << 4])
    assert (codes[0], codes[3]) == (0, 15)
