"""What int8_channel shares with int4_channel is tested in test_int4_channel.py."""

import torch

from pipeline import codecs
from tests.codecs.inputs import gaussian, stored_affine, stored_codes, with_outlier_channels


def test_a_token_spans_all_256_levels():
    packed = codecs.build("int8_channel").pack(gaussian(6, 256))

    codes = stored_codes(packed, 8, 256)
    assert codes.min(axis=1).tolist() == [0] * 6
    assert codes.max(axis=1).tolist() == [255] * 6


def test_a_value_is_code_times_step_plus_minimum_times_the_scale_of_its_channel():
    rows = with_outlier_channels(5, 32, 20.0)
    codec = codecs.build("int8_channel", {"scales": "float32"})

    packed = codec.pack(rows)

    minimum, step = stored_affine(packed)
    scale = rows.abs().amax(dim=0).sqrt()
    scaled = torch.from_numpy(stored_codes(packed, 8, 32) * step[:, None] + minimum[:, None])
    torch.testing.assert_close(codec.unpack([packed]), scaled * scale, rtol=1e-6, atol=1e-6)
    assert (scaled * scale - rows).abs().max() < rows.abs().max() / 255
