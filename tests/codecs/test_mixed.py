import dataclasses
import struct

import numpy as np
import pytest
import torch

from pipeline import codecs
from pipeline.errors import CacheFormatError, ConfigError
from tests.codecs.decoders import read_codes
from tests.codecs.inputs import (
    by_importance,
    flat_heads,
    gaussian,
    relative_error,
    stored_affine,
    stored_codes,
    stored_scales,
)
from tests.golden import GoldenCase, golden_cases

CASES = golden_cases("zipcache")
TWO_CLASSES = [case for case in CASES if case.options["classes"] == "two"]


@pytest.mark.parametrize("case", TWO_CLASSES, ids=lambda case: case.name)
def test_what_is_stored_equals_the_published_code(case: GoldenCase) -> None:
    rows = by_importance(case)
    width, low = rows.shape[1], case.options["unimportant_tokens"]
    high = len(rows) - low
    codec = codecs.build("mixed", {"scales": "float32"})

    packed = codec.pack(rows)

    assert struct.unpack_from("<II", packed.head) == (width, high)
    scale = case.expected["value_channel_scale"].flatten()
    stored_scale = stored_scales(packed.head[8 : 8 + 4 * width])
    np.testing.assert_allclose(stored_scale, scale, rtol=1e-5, atol=1e-6)
    minimum, step = stored_affine(packed)
    codes = stored_codes(packed, 2, width)
    extra = np.frombuffer(packed.head[8 + 4 * width :], np.uint8).reshape(high, -1)
    codes[:high] |= read_codes(extra, 2, width) << 2
    for kind, rows_here, bits in (("", slice(high), 4), ("un", slice(high, None), 2)):
        published = case.expected[f"value_codes_{kind}important"].numpy()
        assert (codes[rows_here] == read_codes(published, bits, width)).all()
        for name, values in (("minimum", minimum), ("step", step)):
            expected = case.expected[f"value_{name}_{kind}important"]
            np.testing.assert_allclose(values[rows_here], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", TWO_CLASSES[1:], ids=lambda case: case.name)
def test_values_come_back_as_from_the_published_code(case: GoldenCase) -> None:
    ids = torch.cat([case.inputs["important_ids"], case.inputs["unimportant_ids"]], dim=2)[0, 0]
    codec = codecs.build("mixed", {"scales": "float32"})

    unpacked = codec.unpack([codec.pack(by_importance(case))])

    expected = flat_heads(case.expected["value"])[ids.long()]
    torch.testing.assert_close(unpacked, expected, rtol=1e-5, atol=1e-5)


def test_one_class_of_two_bits_equals_the_published_code() -> None:
    (case,) = [case for case in CASES if case.options.get("bits") == 2]
    codec = codecs.build("mixed", {"scales": "float32", "low_share": 1.0})

    packed = codec.pack(flat_heads(case.inputs["value"]))

    assert packed.tokens == case.expected["value_codes"].numpy().tobytes()
    expected = flat_heads(case.expected["value"])
    torch.testing.assert_close(codec.unpack([packed]), expected, rtol=1e-5, atol=1e-5)


def test_important_tokens_come_back_better() -> None:
    rows = gaussian(50, 128)
    codec = codecs.build("mixed")

    unpacked = codec.unpack([codec.pack(rows)])

    assert relative_error(rows[:30], unpacked[:30]) < 0.15
    assert 0.4 < relative_error(rows[30:], unpacked[30:]) < 0.7


def test_important_tokens_keep_the_smaller_error_promised_for_them() -> None:
    rows = gaussian(50, 128)
    codec = codecs.build("mixed", {"high_bits": 8, "low_bits": 4})

    error = (codec.unpack([codec.pack(rows)]) - rows).abs() / rows.abs().max()

    assert error[:30].max() <= 1.01 / 255
    assert 1.01 / 255 < error[30:].max() <= codec.max_error


@pytest.mark.parametrize(("count", "share", "important"), [(10, 0.4, 6), (3, 0.4, 2), (1, 0.4, 1)])
def test_the_share_of_the_less_important_is_rounded_down(count, share, important) -> None:
    packed = codecs.build("mixed", {"low_share": share}).pack(gaussian(count, 8))

    assert struct.unpack_from("<II", packed.head) == (8, important)


@pytest.mark.parametrize("count", [1, 29, 30, 31, 49])
def test_images_cut_to_a_prefix_unpack_together_as_their_first_tokens(count: int) -> None:
    codec = codecs.build("mixed")
    packed = [codec.pack(gaussian(50, 32) * factor) for factor in (1, 2, 3)]
    size = codec.token_bytes(32)
    cut = [
        dataclasses.replace(p, tokens=p.tokens[: size * n], aux=p.aux[: 8 * n], num_tokens=n)
        for p, n in zip(packed, (count, 50, count), strict=True)
    ]

    together = codec.unpack(cut)

    whole = [codec.unpack([p]) for p in packed]
    assert torch.equal(together, torch.cat([whole[0][:count], whole[1], whole[2][:count]]))


def test_a_mix_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="high_bits=4 must be more than low_bits=4"):
        codecs.build("mixed", {"high_bits": 4, "low_bits": 4})


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="low_share"):
        codecs.build("mixed", {"low_share": share})


def test_a_damaged_count_of_important_tokens_is_refused() -> None:
    codec = codecs.build("mixed")
    packed = codec.pack(gaussian(10, 32))
    damaged = dataclasses.replace(packed, head=struct.pack("<II", 32, 7) + packed.head[8:])

    with pytest.raises(CacheFormatError, match=r"expected 128 for 7 of 32 features"):
        codec.unpack([damaged])
