import pytest
import torch

from pipeline.codecs._bits import pack_codes, packed_bytes, unpack_codes


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("width", [1, 2, 3, 7, 8, 9, 64])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_codes_come_back_from_as_many_bytes_as_promised(bits, width, count):
    generator = torch.Generator().manual_seed(width)
    codes = torch.randint(0, 2**bits, (count, width), dtype=torch.uint8, generator=generator)

    packed = pack_codes(codes, bits)

    assert packed.shape == (count, packed_bytes(width, bits))
    assert packed_bytes(width, bits) <= -(-width * bits // 8) + 1
    assert torch.equal(unpack_codes(packed, bits, width=width), codes)


def test_codes_fill_bytes_from_the_low_bits_of_all_bytes_up():
    codes = torch.tensor([[1, 2, 3, 4, 5, 6]], dtype=torch.uint8)

    assert pack_codes(codes, 4).tolist() == [[0x41, 0x52, 0x63]]
    assert pack_codes(codes & 3, 2).tolist() == [[0b00_01_11_01, 0b00_10_00_10]]
