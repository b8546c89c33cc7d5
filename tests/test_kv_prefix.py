"""Answers from keys and values of a fixed prompt are those from the image's tokens."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline import codecs
from pipeline.codecs import Codec
from pipeline.consumers.hf import prepare, weighted_generate
from pipeline.consumers.kv_packing import PackedPrefix, pack_prefix, unpack_prefixes
from pipeline.consumers.kv_prefix import (
    KeyValues,
    KVPrefix,
    as_cache,
    make_prefix,
    make_prefixes,
    prepare_prefixed,
    text_states,
)
from pipeline.errors import CacheFormatError, ConfigError
from pipeline.types import PackedTokens, TileLayout
from tests.prefix_models import PROMPT, QUESTIONS, Row, build_model, build_tokenizer, row, rows

PLACEMENTS = ("packed", "original", "weighted")


@pytest.fixture(scope="module")
def llava() -> Any:
    return build_model()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build_tokenizer()


def prompts() -> list[str]:
    return [PROMPT + question for question in QUESTIONS]


@torch.no_grad()
def logits_from_tokens(model: Any, tokenizer: Any, images: list[Row], placement: str) -> Tensor:
    inputs = prepare(model, tokenizer, prompts(), images, placement=placement)
    packed = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp_min(0)
    return model(**{"position_ids": packed, **inputs}).logits[:, -1]


@torch.no_grad()
def logits_from_prefixes(model: Any, tokenizer: Any, prefixes: list[KVPrefix]) -> Tensor:
    return model(**prepare_prefixed(model, tokenizer, prefixes, QUESTIONS)).logits[:, -1]


def said(model: Any, inputs: dict[str, Any], **options: Any) -> list[list[int]]:
    """Return the new tokens of each prompt."""
    before = inputs["input_ids"].shape[1]
    given = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **options}
    return weighted_generate(model, inputs, **given)[:, before:].tolist()


def stored(prefixes: list[KVPrefix], codec: Codec, model: Any) -> list[KVPrefix]:
    """Pack and unpack."""
    return unpack_prefixes(
        [pack_prefix(prefix, codec) for prefix in prefixes],
        codec,
        prompt=prefixes[0].prompt,
        placement=prefixes[0].placement,
        text=text_states(model, prefixes[0].prompt),
    )


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_ragged_prefixes_answer_as_the_tokens_do(llava, tokenizer, placement) -> None:
    prefixes = make_prefixes(llava, tokenizer, PROMPT, rows(), placement=placement)

    expected = logits_from_tokens(llava, tokenizer, rows(), placement)
    found = logits_from_prefixes(llava, tokenizer, prefixes)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    from_tokens = prepare(llava, tokenizer, prompts(), rows(), placement=placement)
    from_prefixes = prepare_prefixed(llava, tokenizer, prefixes, QUESTIONS)
    assert said(llava, from_prefixes) == said(llava, from_tokens)


def tiled_rows() -> list[Row]:
    """Return rows of an image of two tiles, 4 x 6 of their 4 x 8 tokens no padding."""
    tiles = TileLayout(rows=1, columns=2, unpadded=(0, 4, 1, 7))
    kept = ([0, 5, 17, 18, 37], [3, 18], [18, 33])
    return [
        replace(row(positions, seed=seed), grid=(3, 4, 4), tiles=tiles)
        for seed, positions in enumerate(kept)
    ]


@pytest.mark.parametrize("kind", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_other_families_answer_as_from_tokens(kind: str, placement: str, tokenizer) -> None:
    model, images = build_model(kind), tiled_rows()
    prefixes = make_prefixes(model, tokenizer, PROMPT, images, placement=placement)

    back = stored(prefixes, codecs.build("fp32", {}), model)

    # The kept tokens, and an end for each row of the canvas (of both tiles) with one of them.
    assert [len(prefix.ranks) for prefix in back] == [7, 3, 3]
    expected = logits_from_tokens(model, tokenizer, images, placement)
    found = logits_from_prefixes(model, tokenizer, back)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    from_tokens = prepare(model, tokenizer, prompts(), images, placement=placement)
    assert said(model, prepare_prefixed(model, tokenizer, back, QUESTIONS)) == said(
        model, from_tokens
    )


def test_the_ends_of_rows_are_its_least_important_tokens(tokenizer) -> None:
    image = replace(tiled_rows()[0], ranks=torch.tensor([3, 0, 1, 4, 2]))

    prefix = make_prefix(build_model("llava_next"), tokenizer, PROMPT, image)

    # 0 and 5 of the thumbnail; 17, 18 and the end of row 0; 37 and the end of row 1.
    assert prefix.ranks.tolist() == [3, 0, 1, 4, 5, 2, 6]


def test_one_prefix_serves_several_questions(llava, tokenizer) -> None:
    image = rows()[0]
    prefix = make_prefix(llava, tokenizer, PROMPT, image)

    together = said(llava, prepare_prefixed(llava, tokenizer, [prefix] * 3, QUESTIONS))

    alone = [
        said(llava, prepare(llava, tokenizer, [PROMPT + question], [image]))[0]
        for question in QUESTIONS
    ]
    assert together == alone
    assert len({tuple(answer) for answer in alone}) == 3


def test_another_image_answers_otherwise(llava, tokenizer) -> None:
    one = [make_prefix(llava, tokenizer, PROMPT, row([0, 3, 7], seed=seed)) for seed in (4, 5)]

    found = [logits_from_prefixes(llava, tokenizer, [prefix] * 3) for prefix in one]

    assert (found[0] - found[1]).abs().max() > 0.05


def test_sampling_is_served(llava, tokenizer) -> None:
    prefix = make_prefix(llava, tokenizer, PROMPT, rows()[0])

    inputs = prepare_prefixed(llava, tokenizer, [prefix], QUESTIONS[:1])
    answer = said(llava, inputs, do_sample=True, temperature=1e-4)

    greedy = said(llava, prepare_prefixed(llava, tokenizer, [prefix], QUESTIONS[:1]))
    assert answer == greedy


def test_making_prefixes_together_or_alone_is_the_same(llava, tokenizer) -> None:
    together = make_prefixes(llava, tokenizer, PROMPT, rows(), placement="weighted")
    alone = [make_prefix(llava, tokenizer, PROMPT, r, placement="weighted") for r in rows()]

    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.states.keys, other.states.keys, rtol=0, atol=1e-5)
        torch.testing.assert_close(one.states.values, other.states.values, rtol=0, atol=1e-5)
        assert torch.equal(one.positions, other.positions)
        assert torch.equal(one.sizes, other.sizes)
        assert one.end == other.end


def test_a_prefix_says_where_its_tokens_stand(llava, tokenizer) -> None:
    """`what is` before, `in` behind, and 4 of 16 tokens between."""
    image = rows()[0]

    packed = make_prefix(llava, tokenizer, PROMPT, image)
    weighted = make_prefix(llava, tokenizer, PROMPT, image, placement="weighted")

    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert (packed.end, packed.sizes.tolist()) == (7, [1.0] * 7)
    assert weighted.positions.tolist() == [0, 1, 2, 5, 9, 17, 18]
    assert weighted.end == 19
    assert weighted.sizes.tolist() == pytest.approx([1, 1, 1, 5, 2, 8, 1])


def test_the_cache_is_padded_on_the_left(llava, tokenizer) -> None:
    prefixes = make_prefixes(llava, tokenizer, PROMPT, rows())

    cache = as_cache(llava, prefixes)

    keys = cache.layers[2].keys
    assert keys.shape == (3, 2, 7, 12)
    assert torch.equal(keys[1, :, :3], torch.zeros(2, 3, 12))
    assert torch.equal(keys[1, :, 3:], prefixes[1].states.keys[2])


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_lossless_codec_changes_nothing(llava, tokenizer, placement) -> None:
    prefixes = make_prefixes(llava, tokenizer, PROMPT, rows(), placement=placement)

    back = stored(prefixes, codecs.build("fp32", {}), llava)

    for one, other in zip(back, prefixes, strict=True):
        first = len(one.prompt.before)
        assert torch.equal(one.states.keys[:, :, first:], other.states.keys[:, :, first:])
        assert torch.equal(one.states.values[:, :, first:], other.states.values[:, :, first:])
        assert torch.equal(one.positions, other.positions)
        assert torch.equal(one.sizes, other.sizes)
        assert torch.equal(one.ranks, other.ranks)
        assert one.end == other.end
    expected = logits_from_tokens(llava, tokenizer, rows(), placement)
    found = logits_from_prefixes(llava, tokenizer, back)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    from_tokens = prepare(llava, tokenizer, prompts(), rows(), placement=placement)
    assert said(llava, prepare_prefixed(llava, tokenizer, back, QUESTIONS)) == said(
        llava, from_tokens
    )


def test_the_text_before_the_image_takes_no_bytes(llava, tokenizer) -> None:
    codec = codecs.build("fp32", {})

    packed = pack_prefix(make_prefix(llava, tokenizer, PROMPT, rows()[0]), codec).packed

    assert packed.num_tokens == 5  # 4 of the image, and `in`
    assert len(packed.tokens) == 5 * 2 * 3 * 24 * 4  # keys and values, layers, width, float32
    assert packed.head == bytes(4) * 6


def matrices(prefix: KVPrefix) -> Tensor:
    """Return the (M, N, D) that a codec is given, in position order."""
    both = torch.stack([prefix.states.keys, prefix.states.values], dim=1)
    rows = both[:, :, :, len(prefix.prompt.before) :].transpose(2, 3)
    return rows.reshape(-1, rows.shape[2], rows.shape[3] * rows.shape[4])


def excess(codec: Codec, original_MND: Tensor, found_MND: Tensor) -> float:
    """Return the largest error of a matrix, in units of what the codec guarantees of it."""
    error_MND = (found_MND - original_MND).abs()
    if codec.error_of == "token":
        error, largest = error_MND.amax(dim=2), original_MND.abs().amax(dim=2)
    elif codec.error_of == "image":
        error, largest = error_MND.amax(dim=(1, 2)), original_MND.abs().amax(dim=(1, 2))
    else:
        error = error_MND.square().mean(dim=(1, 2)).sqrt()
        largest = original_MND.abs().amax(dim=(1, 2))
    return float((error / (codec.max_error * largest.clamp_min(codec.smallest))).max())


@pytest.mark.parametrize("name", codecs.names())
def test_stored_states_are_off_by_no_more_than_the_codec_says(llava, tokenizer, name) -> None:
    codec = codecs.build(name, {})
    prefixes = make_prefixes(llava, tokenizer, PROMPT, rows(), placement="weighted")

    back = stored(prefixes, codec, llava)

    for prefix, found in zip(prefixes, back, strict=True):
        # fp32 promises 0: then any difference is too much, and 0 / 0 is none.
        if codec.max_error:
            assert excess(codec, matrices(prefix), matrices(found)) <= 1
        else:
            assert torch.equal(matrices(prefix), matrices(found))


@pytest.mark.parametrize("name", ["int8", "int4", "mixed", "gear"])
def test_states_in_another_order_are_off_by_more(llava, tokenizer, name) -> None:
    """What the test before this one would catch: tokens, or keys and values, mixed up."""
    codec = codecs.build(name, {})
    image = row(list(range(16)))
    prefix = make_prefix(llava, tokenizer, PROMPT, image)
    (found,) = stored([prefix], codec, llava)

    states = matrices(found)
    swapped = states.view(3, 2, *states.shape[1:]).flip(1).reshape(states.shape)

    assert excess(codec, matrices(prefix), states.roll(1, dims=1)) > 1
    assert excess(codec, matrices(prefix), swapped) > 1


def with_signs(prefix: KVPrefix, back: KVPrefix, seed: int) -> KVPrefix:
    """Return a prefix off by what storing it added, in places, but with signs drawn at random."""
    generator = torch.Generator().manual_seed(seed)

    def off(exact: Tensor, found: Tensor) -> Tensor:
        signs = torch.randint(0, 2, exact.shape, generator=generator) * 2 - 1
        return exact + (found - exact) * signs

    return replace(
        prefix,
        states=KeyValues(
            keys=off(prefix.states.keys, back.states.keys),
            values=off(prefix.states.values, back.states.values),
        ),
    )


def deviation(model: Any, tokenizer: Any, prefixes: list[KVPrefix], expected: Tensor) -> float:
    """Return the root mean square error of the logits."""
    found = logits_from_prefixes(model, tokenizer, prefixes)
    return float((found - expected).square().mean().sqrt())


@pytest.mark.parametrize("name", codecs.names())
def test_logits_are_off_as_noise_of_the_codecs_size_puts_them(llava, tokenizer, name) -> None:
    """A bound that moves with the codec, whose own error the tests above bound."""
    expected = logits_from_tokens(llava, tokenizer, rows(), "weighted")
    prefixes = make_prefixes(llava, tokenizer, PROMPT, rows(), placement="weighted")
    back = stored(prefixes, codecs.build(name, {}), llava)

    by_noise = [
        deviation(
            llava,
            tokenizer,
            [with_signs(p, b, seed) for p, b in zip(prefixes, back, strict=True)],
            expected,
        )
        for seed in range(20)
    ]

    assert deviation(llava, tokenizer, back, expected) <= 1.5 * max(by_noise) + 1e-5


FAULTS: dict[str, Callable[[KVPrefix], KVPrefix]] = {
    "questions one place too late": lambda p: replace(p, end=p.end + 1),
    "sizes lost": lambda p: replace(p, sizes=torch.ones_like(p.sizes)),
    "keys and values swapped": lambda p: replace(
        p, states=KeyValues(keys=p.states.values, values=p.states.keys)
    ),
    "layers in another order": lambda p: replace(
        p, states=KeyValues(keys=p.states.keys.flip(0), values=p.states.values)
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_put_logits_further_off_than_a_codec(llava, tokenizer, fault) -> None:
    """What the test before this one would catch, at 8 bits."""
    expected = logits_from_tokens(llava, tokenizer, rows(), "weighted")
    prefixes = make_prefixes(llava, tokenizer, PROMPT, rows(), placement="weighted")
    back = stored(prefixes, codecs.build("int8", {}), llava)

    broken = deviation(llava, tokenizer, [FAULTS[fault](prefix) for prefix in back], expected)

    assert broken > 3 * deviation(llava, tokenizer, back, expected)


def test_important_tokens_get_the_bits_of_mixed(llava, tokenizer) -> None:
    codec = codecs.build("mixed", {"low_share": 0.5})
    image = row(list(range(16)))
    prefix = make_prefix(llava, tokenizer, PROMPT, image)

    (found,) = stored([prefix], codec, llava)

    error_N = (matrices(found) - matrices(prefix)).square().mean(dim=(0, 2))[:16]
    is_important = image.ranks < 8  # and the text: 9 of 17 tokens
    assert error_N[is_important].max() < error_N[~is_important].min()


def test_a_question_that_the_tokenizer_joins_to_the_prefix_is_refused(llava, tokenizer) -> None:
    prefix = make_prefix(llava, tokenizer, PROMPT, rows()[0])

    with pytest.raises(ConfigError, match="'what is <image> inthis' does not begin with the tok"):
        prepare_prefixed(llava, tokenizer, [prefix], ["this"])


@pytest.mark.parametrize(
    ("prefixes", "questions", "message"),
    [
        (1, [" this", " two"], "1 prefixes for 2 questions"),
        (0, [], "no prefixes"),
        (1, [""], "nothing behind its prefix"),
    ],
)
def test_prefixes_and_questions_must_fit(llava, tokenizer, prefixes, questions, message) -> None:
    made = [make_prefix(llava, tokenizer, PROMPT, rows()[0])] * prefixes

    with pytest.raises(ValueError, match=message):
        prepare_prefixed(llava, tokenizer, made, questions)


def test_prefixes_of_two_placements_are_refused(llava, tokenizer) -> None:
    made = [make_prefix(llava, tokenizer, PROMPT, rows()[0], placement=p) for p in PLACEMENTS[:2]]

    with pytest.raises(ValueError, match=r"the placements \['original', 'packed'\]"):
        prepare_prefixed(llava, tokenizer, made, QUESTIONS[:2])


def test_a_model_of_another_type_is_refused(llava, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(llava.config, "model_type", "paligemma")

    with pytest.raises(ConfigError, match="'paligemma' cannot start from stored keys and values"):
        make_prefix(llava, tokenizer, PROMPT, rows()[0])


@pytest.mark.parametrize("prompt", ["what is", "what <image> is <image>"])
def test_a_prompt_without_exactly_one_image_is_refused(llava, tokenizer, prompt) -> None:
    with pytest.raises(ConfigError, match=r"holds the image token \(id 3\) [02] times"):
        make_prefix(llava, tokenizer, prompt, rows()[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
            "do not attend to all tokens before",
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "of type 'dynamic', which depend on the length",
        ),
    ],
)
def test_decoders_whose_prefixes_depend_on_what_follows_are_refused(
    tokenizer, options, message
) -> None:
    model = build_model("llava_onevision", **options)

    with pytest.raises(ConfigError, match=message):
        make_prefix(model, tokenizer, PROMPT, rows()[0])


def test_a_prompt_that_begins_with_the_image_has_no_text_states(llava, tokenizer) -> None:
    prefix = make_prefix(llava, tokenizer, "<image>", rows()[0])

    (back,) = stored([prefix], codecs.build("fp32", {}), llava)

    assert text_states(llava, prefix.prompt).keys.shape == (3, 2, 0, 12)
    inputs = prepare_prefixed(llava, tokenizer, [back], QUESTIONS[:1])
    expected = prepare(llava, tokenizer, ["<image>" + QUESTIONS[0]], rows()[:1])
    assert said(llava, inputs) == said(llava, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: replace(p, tokens=p.tokens[:-1]), "bytes for 5 tokens of 6 matrices"),
        (lambda p: replace(p, head=p.head[:-2]), "heads of matrices, expected 6"),
        (lambda p: replace(p, head=p.head + bytes(4)), "holds 7 heads of matrices"),
        (lambda p: replace(p, num_tokens=4), "bytes for 4 tokens of 6 matrices"),
    ],
)
def test_bytes_of_another_shape_are_refused(llava, tokenizer, change, message) -> None:
    codec = codecs.build("mixed", {})
    prefix = make_prefix(llava, tokenizer, PROMPT, rows()[0])
    packed = pack_prefix(prefix, codec)
    broken: PackedTokens = change(packed.packed)
    one = PackedPrefix(
        packed=broken, positions=packed.positions, sizes=packed.sizes, end=packed.end
    )

    with pytest.raises(CacheFormatError, match=message):
        unpack_prefixes(
            [one],
            codec,
            prompt=prefix.prompt,
            placement="packed",
            text=text_states(llava, prefix.prompt),
        )
