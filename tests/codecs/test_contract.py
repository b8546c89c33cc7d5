"""Every codec in the registry keeps the promises of `Codec`; a new one is tested by its file."""

import dataclasses
import importlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from pipeline import codecs
from pipeline.errors import CacheFormatError, ConfigError, NonFiniteError
from pipeline.types import PackedTokens

WIDTHS = [1, 7, 48, 96, 128, 1152, 2048]
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=codecs.names())
def name(request):
    return request.param


@pytest.fixture
def codec(name):
    return codecs.build(name)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def features(count: int, width: int, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator)


def part(
    packed: PackedTokens, start: int, stop: int, codec: codecs.Codec, width: int
) -> PackedTokens:
    """Return what is stored for the tokens from `start` to before `stop`."""
    size = codec.token_bytes(width)
    return PackedTokens(
        tokens=packed.tokens[start * size : stop * size],
        aux=packed.aux[start * codec.aux_bytes : stop * codec.aux_bytes],
        num_tokens=stop - start,
        head=packed.head,
    )


def assert_within_max_error(codec: codecs.Codec, original: Tensor) -> None:
    exact = original.double()
    unpacked = codec.unpack([codec.pack(original)]).double()
    assert unpacked.shape == exact.shape
    error = (unpacked - exact).abs()
    if codec.error_of == "token":
        error, largest = error.amax(dim=1), exact.abs().amax(dim=1)
    elif codec.error_of == "image":
        error, largest = error.amax(), exact.abs().amax()
    else:
        assert codec.error_of == "image_rms"
        error, largest = error.square().mean().sqrt(), exact.abs().amax()
    largest = largest.clamp(min=codec.smallest)
    assert (error <= codec.max_error * largest).all(), (error / largest).max()


@st.composite
def tokens(draw):
    """Any finite values, and the shapes of token that scales and rotations find hard."""
    width = draw(st.sampled_from([1, 2, 5, 24, 64]))
    values = arrays(np.float32, (4, width), elements=st.floats(-6e4, 6e4, width=32))
    drawn = torch.from_numpy(draw(values))
    one_outlier = torch.full((1, width), draw(st.floats(0, 1)))
    one_outlier[0, draw(st.integers(0, width - 1))] = 5e4
    constant = torch.full((1, width), draw(st.floats(-6e4, 6e4)))
    alternating = torch.tensor([1.0, -1.0]).repeat(width)[:width].unsqueeze(0)
    tiny = drawn[:1] * 1e-35
    return torch.cat([drawn, one_outlier, constant, alternating, tiny, torch.zeros(1, width)])


def test_it_has_a_source_and_a_test_file_of_its_own(name):
    module = importlib.import_module(f"pipeline.codecs.{name}")

    assert "Source:" in module.__doc__
    assert Path(__file__).with_name(f"test_{name}.py").exists()


def test_its_options_all_have_defaults_and_unknown_ones_are_refused(name):
    fields = dataclasses.fields(codecs.load(name))

    assert all(
        f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING
        for f in fields
    )
    with pytest.raises(ConfigError, match="no option 'sed'"):
        codecs.build(name, {"sed": 1})


def test_it_is_a_value_that_travels_between_processes(codec):
    again = pickle.loads(pickle.dumps(codec))

    assert again == codec
    assert hash(again) == hash(codec)
    assert again.pack(features(3, 8)) == codec.pack(features(3, 8))


@pytest.mark.parametrize("width", WIDTHS)
def test_a_token_takes_the_bytes_promised(codec, width):
    packed = codec.pack(features(5, width))

    assert packed.num_tokens == 5
    assert len(packed.tokens) == 5 * codec.token_bytes(width)
    assert len(packed.aux) == 5 * codec.aux_bytes


@pytest.mark.parametrize("width", WIDTHS)
def test_gaussian_features_come_back_within_the_error_promised(codec, width):
    assert_within_max_error(codec, features(40, width))


@settings(max_examples=60, deadline=None)
@given(original=tokens())
@pytest.mark.parametrize("kind", codecs.names())
def test_hard_tokens_come_back_within_the_error_promised(kind, original):
    assert_within_max_error(codecs.build(kind), original)


def test_zeros_stay_zeros(codec):
    assert torch.equal(codec.unpack([codec.pack(torch.zeros(3, 64))]), torch.zeros(3, 64))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", [1, 2, 9])
def test_a_prefix_of_the_bytes_unpacks_to_the_first_tokens(codec, width, count):
    packed = codec.pack(features(9, width))

    cut = codec.unpack([part(packed, 0, count, codec, width)])

    assert torch.equal(cut, codec.unpack([packed])[:count])


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("width", WIDTHS)
def test_a_token_is_stored_the_same_alone_and_among_others_unless_declared(codec, width, step):
    rows = features(300, width)

    together = codec.pack(rows)

    same = all(  # ends at the first that differs: some codecs take long for one token
        codec.pack(rows[token : token + 1]) == part(together, token, token + 1, codec, width)
        for token in range(0, len(rows), step)
    )
    assert same != codec.whole_image


def test_the_number_of_threads_changes_no_bit(codec, two_threads):
    rows = features(300, 1024)

    many = codec.pack(rows)
    many_unpacked = codec.unpack([many])
    torch.set_num_threads(1)

    assert codec.pack(rows) == many
    assert torch.equal(codec.unpack([many]), many_unpacked)


def test_images_unpack_together_as_they_do_alone(codec):
    packed = [codec.pack(features(count, 96, seed=count)) for count in (3, 1, 200, 8)]

    together = codec.unpack(packed)

    assert torch.equal(together, torch.cat([codec.unpack([image]) for image in packed]))
    assert together.shape == (212, 96)
    assert together.is_contiguous()


@pytest.mark.parametrize("dtype", FLOATS)
def test_features_of_any_float_type_are_taken_and_left_alone(codec, dtype):
    rows = features(4, 96).to(dtype)
    before = rows.clone()

    packed = codec.pack(rows)

    assert packed == codec.pack(rows.float())
    assert torch.equal(rows, before)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_result_has_the_type_asked_for(codec, dtype):
    packed = codec.pack(features(4, 96))

    unpacked = codec.unpack([packed], dtype=dtype)

    assert unpacked.dtype == dtype
    assert torch.equal(unpacked, codec.unpack([packed]).to(dtype))


def test_strided_features_and_those_with_gradients_are_stored_alike(codec):
    rows = features(6, 96)
    wide = torch.cat([rows, rows], dim=1).repeat_interleave(2, dim=0)
    strided = wide[::2, :96]
    transposed = rows.t().contiguous().t()

    expected = codec.pack(rows)

    assert not strided.is_contiguous()
    assert codec.pack(strided) == expected
    assert codec.pack(transposed) == expected
    assert codec.pack(rows.clone().requires_grad_()) == expected


def test_a_result_can_be_written_to_and_leaves_the_stored_bytes_alone(codec):
    packed = codec.pack(features(4, 96))
    before = codec.unpack([packed])

    codec.unpack([packed]).add_(1)

    assert torch.equal(codec.unpack([packed]), before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_refused_with_its_token(codec, bad):
    rows = features(5, 96)
    rows[3, 17] = bad

    with pytest.raises(NonFiniteError, match=f"token 3, feature 17 is {bad}, but only finite"):
        codec.pack(rows)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (8,), (1, 3, 8)])
def test_features_of_another_shape_are_refused(codec, shape):
    with pytest.raises(ValueError, match=r"expected \(K, D\)"):
        codec.pack(torch.zeros(shape))


def test_integers_are_refused(codec):
    with pytest.raises(TypeError, match=r"torch\.int64, expected a float"):
        codec.pack(torch.zeros(2, 8, dtype=torch.int64))


def test_bytes_that_do_not_fit_the_number_of_tokens_are_refused(codec):
    good = codec.pack(features(4, 96))
    cut = dataclasses.replace(good, tokens=good.tokens[:-1])

    with pytest.raises(CacheFormatError, match=f"image 1 has {len(cut.tokens)} bytes of codes"):
        codec.unpack([good, cut])


def test_missing_codes_are_refused(codec):
    packed = dataclasses.replace(codec.pack(features(4, 96)), tokens=b"")

    with pytest.raises(CacheFormatError, match="0 bytes of codes for 4 tokens"):
        codec.unpack([packed])


def test_bytes_beside_the_codes_that_do_not_fit_are_refused(codec):
    good = codec.pack(features(4, 96))
    long = dataclasses.replace(good, aux=good.aux + b"\0")

    with pytest.raises(CacheFormatError, match=f"expected {len(good.aux)}"):
        codec.unpack([long])


@pytest.mark.parametrize("which", [0, 1])
def test_a_head_of_another_length_is_refused(codec, which):
    good = codec.pack(features(4, 96))
    heads = (good.head[:-1], good.head + b"\0") if good.head else (b"\0", b"\0\0\0\0")
    damaged = dataclasses.replace(good, head=heads[which])

    with pytest.raises(CacheFormatError, match="image 1 has a head of"):
        codec.unpack([good, damaged])


@pytest.mark.parametrize("count", [0, -1])
def test_an_image_without_tokens_is_refused(codec, count):
    with pytest.raises(CacheFormatError, match=f"image 0 has {count} tokens"):
        codec.unpack([PackedTokens(tokens=b"", aux=b"", num_tokens=count)])


def test_unpacking_nothing_is_refused(codec):
    with pytest.raises(CacheFormatError, match="no images"):
        codec.unpack([])


def test_images_of_different_widths_are_refused(codec):
    with pytest.raises(CacheFormatError, match="image 1 has 48 features per token and image 0"):
        codec.unpack([codec.pack(features(2, 96)), codec.pack(features(2, 48))])


@pytest.mark.gpu
def test_a_gpu_stores_and_reads_the_same_bits(codec):
    rows = features(300, 1152)
    packed = codec.pack(rows)

    assert codec.pack(rows.cuda()) == packed
    unpacked = codec.unpack([packed], device="cuda")
    assert unpacked.is_cuda
    assert torch.equal(unpacked.cpu(), codec.unpack([packed]))
