import struct

import pytest
import torch

from pipeline import codecs
from pipeline.errors import NonFiniteError


def test_a_value_is_stored_as_little_endian_float32():
    packed = codecs.build("fp32").pack(torch.tensor([[1.0, -2.5]]))

    assert packed.tokens == struct.pack("<2f", 1.0, -2.5)
    assert packed.aux == b""


def test_every_float32_comes_back_bit_for_bit():
    codec = codecs.build("fp32")
    extremes = torch.tensor([[3.4e38, -3.4e38, 1e-45, -0.0, 1e30, 1e-30, 1 / 3, 0.0]])

    unpacked = codec.unpack([codec.pack(extremes)])

    assert torch.equal(unpacked.view(torch.int32), extremes.view(torch.int32))


def test_a_64_bit_value_beyond_float32_is_not_stored():
    rows = torch.tensor([[0.0], [1e39]], dtype=torch.float64)

    with pytest.raises(NonFiniteError, match="token 1, feature 0 is"):
        codecs.build("fp32").pack(rows)
