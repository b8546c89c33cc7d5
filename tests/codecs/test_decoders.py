"""What docs/cache_format.md says about the bytes is enough to read them."""

import numpy as np
import pytest
import torch

from pipeline import codecs
from tests.codecs.decoders import READERS

CASES = [
    *[(name, {}) for name in codecs.names()],
    ("int8", {"seed": 9}),
    ("int4", {"seed": 2**63 - 1}),
    ("int4_channel", {"scales": "float32"}),
    ("mixed", {"high_bits": 8, "low_bits": 4, "low_share": 0.9}),
    ("mixed", {"high_bits": 8, "low_bits": 2, "scales": "float32"}),
    ("mixed", {"low_share": 0.0}),
    ("mixed", {"low_share": 1.0}),
    ("gear", {"bits": 2, "group": 10, "rank": 0, "outlier_share": 0.5}),
    ("gear", {"bits": 8, "steps": "published", "numbers": "float32", "outlier_share": 0.0}),
]


@pytest.mark.parametrize("width", [1, 7, 96, 1152])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_reader_written_from_the_page_gets_the_same_numbers(name, options, width):
    rows = torch.randn(9, width, generator=torch.Generator().manual_seed(width))
    rows[:, width // 2] *= 30
    rows[4] = 2.5
    codec = codecs.build(name, options)

    packed = codec.pack(rows)

    expected = READERS[name](packed, options)
    assert expected.shape == (9, width)
    np.testing.assert_array_equal(codec.unpack([packed]).numpy(), expected)
