"""What int2 shares with int4 and int3 is tested in test_int4.py."""

import torch

from pipeline import codecs
from tests.codecs.decoders import LEVELS
from tests.codecs.inputs import stored_codes


def test_every_level_is_stored_as_its_own_code():
    levels = torch.tensor([LEVELS["int2"]], dtype=torch.float32)
    # One value more makes the width odd: nothing is mixed, and the scale of 1 is the best.
    rows = torch.cat([levels, levels[:, -1:]], dim=1)
    codec = codecs.build("int2")

    packed = codec.pack(rows)

    width = rows.shape[1]
    codes = stored_codes(packed, 2, width + packed.head[0])[0, :width]
    assert sorted(set(codes.tolist())) == list(range(len(levels[0])))
    torch.testing.assert_close(codec.unpack([packed]), rows)
