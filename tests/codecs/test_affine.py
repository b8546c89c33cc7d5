"""The rounding between smallest and largest, also along the tokens, as published for keys."""

import numpy as np
import pytest
import torch

from pipeline.codecs._affine import DTYPES, affine_codes
from pipeline.codecs._bits import pack_codes
from tests.golden import GoldenCase, golden_cases

ZIPCACHE = golden_cases("zipcache")


@pytest.mark.parametrize("case", ZIPCACHE, ids=lambda case: case.name)
def test_keys_of_every_channel_are_stored_as_published(case: GoldenCase) -> None:
    key_HLD = case.inputs["key"][0]
    classes = {"": torch.arange(key_HLD.shape[1]).expand(len(key_HLD), -1)}
    bits = {"": case.options.get("bits", 0)}
    if case.options["classes"] == "two":
        kinds = ("important", "unimportant")
        classes = {f"_{kind}": case.inputs[f"{kind}_ids"][0].long() for kind in kinds}
        bits = {f"_{kind}": case.options[f"bits_{kind}"] for kind in kinds}

    for kind, ids_HN in classes.items():
        rows_HND = key_HLD.gather(1, ids_HN.unsqueeze(2).expand(-1, -1, key_HLD.shape[2]))
        channels = rows_HND.transpose(1, 2).flatten(0, 1)
        codes, minimum, step = affine_codes(channels, steps=2 ** bits[kind] - 1)

        expected = case.expected
        assert torch.equal(pack_codes(codes.t(), bits[kind]), expected[f"key_codes{kind}"])
        for name, values in (("minimum", minimum), ("step", step)):
            ours = values.flatten().numpy()
            np.testing.assert_allclose(
                ours, expected[f"key_{name}{kind}"].flatten(), rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("numbers", ["float16", "bfloat16"])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_levels_stored_in_a_short_type_still_span_the_row(numbers: str, size: float) -> None:
    rows = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) * size

    codes, minimum, step = affine_codes(rows, steps=15, numbers=DTYPES[numbers])

    error = (codes * step.float() + minimum.float() - rows).abs()
    assert minimum.dtype == step.dtype == DTYPES[numbers]
    assert (minimum.float() <= rows.amin(dim=1, keepdim=True)).all()
    assert (error <= 0.5001 * step.float()).all()


def test_a_row_of_equal_numbers_has_no_step() -> None:
    codes, minimum, step = affine_codes(torch.full((2, 5), -3.25), steps=255)

    assert not codes.any()
    assert not step.any()
    assert (minimum == -3.25).all()
