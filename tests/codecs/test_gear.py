import dataclasses
import struct

import pytest
import torch
from torch import Tensor

from pipeline import codecs
from pipeline.codecs._low_rank import directions
from pipeline.errors import CacheFormatError, ConfigError, NonFiniteError
from tests.codecs.inputs import flat_heads, gaussian, relative_error, with_outlier_channels
from tests.golden import GoldenCase, golden_cases

CASES = golden_cases("gear")


def round_trip(rows: Tensor, **options: object) -> Tensor:
    codec = codecs.build("gear", options)
    return codec.unpack([codec.pack(rows)])


def published_options(case: GoldenCase, kind: str) -> dict[str, object]:
    return {
        "bits": case.options["bits"],
        "group": case.options[f"group_size_{kind}"],
        "outlier_share": case.options["outlier_share"],
        "rank": 0,
        "steps": "published",
        "numbers": "float32",
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_values_without_their_low_rank_part_equal_the_published_code(case: GoldenCase) -> None:
    rows = flat_heads(case.inputs["value"])

    unpacked = round_trip(rows, **published_options(case, "value"))

    expected = flat_heads(case.expected["value_quantized"]).float()
    torch.testing.assert_close(unpacked.half().float(), expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_keys_channel_by_channel_equal_the_published_code(case: GoldenCase) -> None:
    channels = flat_heads(case.inputs["key"]).t()
    num_tokens = channels.shape[1]
    whole = num_tokens - case.options["key_tail_tokens"]  # what follows is stored as it is there
    options = published_options(case, "key")
    # The published count of outliers is that of a value row, whatever the number of tokens.
    options["outlier_share"] = (2 * case.options["outliers_each_side"] + 0.5) / num_tokens

    unpacked = round_trip(channels, **options)[:, :whole]

    expected = flat_heads(case.expected["key_quantized"]).float().t()[:, :whole]
    torch.testing.assert_close(unpacked.half().float(), expected, rtol=2e-3, atol=1e-5)


ONE_HEAD = [case for case in CASES if case.options["heads"] == 1]


@pytest.mark.parametrize("case", ONE_HEAD, ids=lambda case: case.name)
def test_the_error_is_no_larger_than_that_of_the_published_code(case: GoldenCase) -> None:
    rows = flat_heads(case.inputs["value"])
    options = published_options(case, "value") | {"rank": case.options["rank"]}

    error = (round_trip(rows, **options) - rows).norm()

    assert error <= (flat_heads(case.expected["value"]) - rows).norm()


@pytest.mark.parametrize("kind", ["key", "value"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_directions_found_hold_at_least_as_much_as_the_published_ones(
    case: GoldenCase, kind: str
) -> None:
    exact = case.inputs[kind][0]
    published = case.expected[kind][0]
    errors_HLD = exact - case.expected[f"{kind}_quantized"][0].float()

    for head, error_LD in enumerate(errors_HLD):
        right = directions(error_LD, case.options["rank"]).float()
        left_over = (error_LD - error_LD @ right.T @ right).norm()
        assert left_over <= 1.00001 * (exact - published)[head].norm()


def test_the_directions_are_those_of_the_singular_value_decomposition() -> None:
    error = gaussian(60, 40) * torch.logspace(0, -3, 40)

    found = directions(error, 5)

    exact = torch.linalg.svd(error.double()).Vh[:5]
    torch.testing.assert_close((found @ exact.T).abs(), torch.eye(5).double(), rtol=0, atol=1e-4)


def test_an_error_of_fewer_directions_than_asked_for_gives_zeros_for_the_rest() -> None:
    error = gaussian(30, 2) @ gaussian(2, 50)

    found = directions(error, 4)

    norms = found.norm(dim=1)
    torch.testing.assert_close(norms, torch.tensor([1.0, 1, 0, 0]).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(error.double() @ found.T @ found, error.double(), rtol=0, atol=1e-3)


def test_no_error_has_no_directions() -> None:
    assert not directions(torch.zeros(3, 8), 2).any()


def test_the_outliers_of_each_token_come_back_as_float16() -> None:
    rows = gaussian(20, 100)
    places = torch.randint(100, (20, 1), generator=torch.Generator().manual_seed(0))
    rows.scatter_(1, places, 1000.1)

    unpacked = round_trip(rows, rank=0)

    stored = unpacked.gather(1, places)
    assert (stored == torch.tensor(1000.1).half().float()).all()
    unpacked.scatter_(1, places, 0)
    assert (unpacked - rows.scatter(1, places, 0)).abs().max() < 0.6


def test_more_rank_and_outliers_leave_a_smaller_error() -> None:
    rows = with_outlier_channels(64, 256, 10.0) + 3 * gaussian(64, 1) * gaussian(1, 256)

    errors = [
        relative_error(rows, round_trip(rows, bits=2, rank=rank, outlier_share=share))
        for rank, share in ((0, 0.0), (0, 0.05), (8, 0.05))
    ]

    assert errors[0] > errors[1] > errors[2]


def test_published_steps_use_a_quarter_of_the_levels_of_8_bits() -> None:
    rows = gaussian(16, 256)

    corrected, published = (
        relative_error(rows, round_trip(rows, bits=8, rank=0, numbers="float32", steps=steps))
        for steps in ("corrected", "published")
    )

    assert published == pytest.approx(corrected * 255 / 63, rel=0.05)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e-3, 1e3, 6e4])
def test_images_of_any_size_stay_within_the_error_promised(size: float) -> None:
    codec = codecs.build("gear", {"bits": 8})
    rows = gaussian(30, 96).clamp(-1, 1) * size

    error = (round_trip(rows, bits=8) - rows).double().square().mean().sqrt()

    assert error <= codec.max_error * rows.abs().max().clamp(min=codec.smallest)


def test_ties_among_outliers_are_broken_by_place_and_stay_apart() -> None:
    codec = codecs.build("gear", {"outlier_share": 0.5, "rank": 0, "group": 8})

    packed = codec.pack(torch.tensor([[1.0, 0.0, -0.0, 0.0, 1.0, 1.0, 0.0, 1.0]]))

    places = struct.unpack_from("<4H", packed.tokens, 4 + 2 + 2)
    assert sorted(places[:2]) == [1, 2]
    assert sorted(places[2:]) == [5, 7]


def test_places_beyond_32767_are_read_as_stored() -> None:
    rows = torch.zeros(1, 40000)
    rows[0, 39000], rows[0, 33000] = 7.0, -7.0

    unpacked = round_trip(rows, outlier_share=0.0001, rank=0)

    assert unpacked.nonzero()[:, 1].tolist() == [33000, 39000]


def test_a_value_beyond_float16_is_refused() -> None:
    with pytest.raises(NonFiniteError, match=r"too large for codec 'gear'; its largest is 6\.55e"):
        codecs.build("gear").pack(torch.tensor([[1.0, 7e4]]))


def test_a_token_too_wide_for_its_places_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1 x 65537; codec gear takes up to 65536"):
        codecs.build("gear").pack(torch.zeros(1, 65537))


@pytest.mark.parametrize(
    "options", [{"bits": 3}, {"group": 1}, {"outlier_share": 0.6}, {"rank": 65}, {"steps": "both"}]
)
def test_options_out_of_range_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        codecs.build("gear", options)


def test_an_outlier_without_a_place_is_refused() -> None:
    codec = codecs.build("gear", {"outlier_share": 0.1})
    packed = codec.pack(gaussian(1, 32))
    # 16 bytes of codes, one group's minimum and step, then the places.
    damaged = dataclasses.replace(
        packed, tokens=packed.tokens[:20] + b"\x20\0" + packed.tokens[22:]
    )

    with pytest.raises(CacheFormatError, match="an outlier has place 32, expected less than 32"):
        codec.unpack([damaged])


@pytest.mark.parametrize(("part", "start"), [("head", 4), ("tokens", 16), ("tokens", -2)])
def test_damaged_numbers_are_refused(part: str, start: int) -> None:
    codec = codecs.build("gear", {"outlier_share": 0.1})
    packed = codec.pack(gaussian(1, 32))
    content = bytearray(getattr(packed, part))
    content[start % len(content) : start % len(content) + 2] = struct.pack("<e", float("nan"))
    damaged = dataclasses.replace(packed, **{part: bytes(content)})

    with pytest.raises(CacheFormatError, match="factors hold nan, expected finite"):
        codec.unpack([damaged])


@pytest.mark.parametrize("scale", [1e6, 1e29])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_float32_numbers_hold_values_beyond_float16(bits, scale):
    codec = codecs.build("gear", {"bits": bits, "numbers": "float32"})
    rows = scale * torch.randn(40, 96, generator=torch.Generator().manual_seed(0))

    error = codec.unpack([codec.pack(rows)]).double() - rows.double()

    rms = error.square().mean().sqrt() / rows.abs().max()
    assert rms <= codec.max_error
