from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from pipeline.consumers.hf import prepare, weighted_generate
from pipeline.errors import ConfigError

WORDS = [
    "<pad>",
    "<s>",
    "</s>",
    "<image>",
    *["what", "is", "in", "this", "picture", "answer", "two", "cats", "and", "a", "dog"],
]
IMAGE = WORDS.index("<image>")
GRID = 4  # 28 x 28 pixels in patches of 7


def text_options(vocab_size: int = 64) -> dict:
    return {
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": vocab_size,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def vision_options() -> dict:
    return {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
    }


def build(model_class, config):
    torch.manual_seed(0)
    model = model_class(config).eval()
    # Weights of a real spread: at the default 0.02 an image hardly moves a logit.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
    return model


@pytest.fixture(scope="module")
def llava():
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision_options()),
        text_config=LlamaConfig(**text_options()),
        image_token_id=IMAGE,
    )
    return build(LlavaForConditionalGeneration, config)


@pytest.fixture(scope="module")
def llava_next():
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**vision_options()),
        text_config=LlamaConfig(**text_options()),
        image_token_id=IMAGE,
        image_grid_pinpoints=[[28, 56], [56, 28]],
    )
    return build(LlavaNextForConditionalGeneration, config)


@pytest.fixture(scope="module")
def llava_onevision():
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**vision_options()),
        text_config=Qwen2Config(**text_options()),
        image_token_id=IMAGE,
        image_grid_pinpoints=[[28, 56], [56, 28]],
        vision_aspect_ratio="anyres_max_9",
    )
    return build(LlavaOnevisionForConditionalGeneration, config)


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )


@dataclass
class Processor:
    tokenizer: PreTrainedTokenizerFast


@dataclass
class Row:
    features: Tensor


def pixels(count: int = 1) -> Tensor:
    return torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(1))


def random_features(count: int, width: int = 48, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def tower_features(model, images: Tensor) -> Tensor:
    """What the `pre_projector` stage stores: the last layer but one, without the class token."""
    states = model.base_model.vision_tower(images, output_hidden_states=True).hidden_states
    return states[-2][:, 1:]


def generate(model, inputs, **options) -> list[list[int]]:
    ids = model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, do_sample=False, **options)
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


def pixel_inputs(images: Tensor, before: str, after: str, tokenizer) -> dict:
    text = f"{before} {'<image>' * GRID * GRID} {after}"
    return {**tokenizer([text], return_tensors="pt"), "pixel_values": images}


@torch.no_grad()
@pytest.mark.parametrize("stage", ["projected", "pre_projector"])
def test_all_tokens_of_an_image_give_what_its_pixels_give(llava, tokenizer, stage):
    images = pixels()
    from_pixels = pixel_inputs(images, "what is", "in this picture", tokenizer)
    tower = tower_features(llava, images)
    stored = {"pre_projector": tower, "projected": llava.base_model.multi_modal_projector(tower)}

    inputs = prepare(
        llava, tokenizer, ["what is <image> in this picture"], [stored[stage][0]], stage=stage
    )

    assert torch.equal(inputs["input_ids"], from_pixels["input_ids"])
    logits = llava(**from_pixels).logits
    torch.testing.assert_close(llava(**inputs).logits, logits, rtol=0, atol=1e-4)
    assert generate(llava, inputs) == generate(llava, from_pixels)


@torch.no_grad()
def test_another_image_gives_other_logits(llava, tokenizer):
    prompts = ["what is <image>"]

    one = llava(**prepare(llava, tokenizer, prompts, [random_features(5, seed=1)])).logits
    other = llava(**prepare(llava, tokenizer, prompts, [random_features(5, seed=2)])).logits

    assert (one[:, -1] - other[:, -1]).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_tiled_models_take_the_features_they_compute_themselves(name, tokenizer, request):
    model = request.getfixturevalue(name)
    images = {
        "pixel_values": pixels(3).unsqueeze(0),
        "image_sizes": torch.tensor([[28, 56]]),
    }
    features = model.get_image_features(**images).pooler_output

    inputs = prepare(model, tokenizer, ["what is <image> in this"], list(features))

    expected = model(input_ids=inputs["input_ids"], **images).logits
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=1e-4)
    assert generate(model, inputs) == generate(model, {"input_ids": inputs["input_ids"], **images})


@torch.no_grad()
def test_a_batch_of_ragged_images_gives_what_each_gives_alone(llava, tokenizer):
    prompts = ["what is <image>", "is <image> a dog and this <image> two cats", "what is a dog"]
    images = [random_features(2, seed=2), random_features(16, seed=3), random_features(7, seed=4)]

    batch = prepare(llava, tokenizer, prompts, images)
    alone = [
        prepare(llava, tokenizer, prompts[:1], images[:1]),
        prepare(llava, tokenizer, prompts[1:2], images[1:]),
        prepare(llava, tokenizer, prompts[2:], []),
    ]

    unpadded = llava(**batch).logits[batch["attention_mask"].bool()]
    expected = torch.cat([llava(**single).logits[0] for single in alone])
    torch.testing.assert_close(unpadded, expected, rtol=0, atol=1e-4)
    assert generate(llava, batch) == [generate(llava, single)[0] for single in alone]


@torch.no_grad()
def test_beam_search_takes_ragged_images(llava, tokenizer):
    prompts = ["what is <image>", "is this <image> a dog"]
    images = [random_features(2, seed=2), random_features(6, seed=3)]

    together = generate(llava, prepare(llava, tokenizer, prompts, images), num_beams=3)

    alone = [
        generate(llava, prepare(llava, tokenizer, [prompt], [image]), num_beams=3)[0]
        for prompt, image in zip(prompts, images, strict=True)
    ]
    assert together == alone


def test_prompts_are_padded_on_the_left_and_images_take_one_place_per_token(llava, tokenizer):
    inputs = prepare(
        llava,
        tokenizer,
        ["what <image>", "is <image> a <image> dog"],
        [random_features(2), random_features(3), random_features(1)],
    )

    words = [[WORDS[i] for i in row] for row in inputs["input_ids"].tolist()]
    assert words == [
        ["<pad>", "<pad>", "<pad>", "<pad>", "what", "<image>", "<image>"],
        ["is", "<image>", "<image>", "<image>", "a", "<image>", "dog"],
    ]
    assert inputs["attention_mask"].tolist() == [[0, 0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]
    assert [len(f) for f in inputs["mm_encoder_outputs"]["image"].pooler_output] == [2, 3, 1]


def test_a_processor_and_rows_of_a_cache_are_taken_as_well(llava, tokenizer):
    features = random_features(3)

    plain = prepare(llava, tokenizer, ["what <image>"], [features])
    wrapped = prepare(llava, Processor(tokenizer), ["what <image>"], [Row(features)])

    assert torch.equal(wrapped["input_ids"], plain["input_ids"])
    assert torch.equal(wrapped["mm_encoder_outputs"]["image"].pooler_output[0], features)


@torch.no_grad()
@pytest.mark.parametrize(("stage", "width"), [("projected", 48), ("pre_projector", 32)])
def test_features_stored_in_half_precision_are_taken(llava, tokenizer, stage, width):
    features = random_features(3, width).bfloat16()

    half = llava(**prepare(llava, tokenizer, ["what <image>"], [features], stage=stage)).logits
    full = llava(
        **prepare(llava, tokenizer, ["what <image>"], [features.float()], stage=stage)
    ).logits

    assert torch.equal(half, full)


def test_the_projector_can_be_trained_on_cached_tokens(llava, tokenizer):
    inputs = prepare(
        llava, tokenizer, ["what <image> is"], [random_features(3, 32)], stage="pre_projector"
    )

    loss = llava(**inputs, labels=inputs["input_ids"]).loss
    weight = llava.base_model.multi_modal_projector.linear_1.weight
    (gradient,) = torch.autograd.grad(loss, [weight])

    assert gradient.abs().sum() > 0


def test_prompts_without_images_need_none(llava, tokenizer):
    inputs = prepare(llava, tokenizer, ["what is this"], [])

    assert "mm_encoder_outputs" not in inputs
    assert llava(**inputs).logits.shape == (1, 3, 64)


def test_images_and_image_tokens_must_be_as_many(llava, tokenizer):
    with pytest.raises(ValueError, match=r"1 images for 3 image tokens .* which hold \[1, 2\]"):
        prepare(llava, tokenizer, ["is <image>", "a <image> and <image>"], [random_features(2)])


@pytest.mark.parametrize("shape", [(0, 48), (48,), (1, 3, 48)])
def test_an_image_without_tokens_is_refused(llava, tokenizer, shape):
    with pytest.raises(ValueError, match="features of image 0 have the shape"):
        prepare(llava, tokenizer, ["is <image>"], [torch.zeros(shape)])


@pytest.mark.parametrize("prompts", [[], "is <image>"])
def test_prompts_are_a_list_of_texts(llava, tokenizer, prompts):
    with pytest.raises(ValueError, match="expected a list of at least one text"):
        prepare(llava, tokenizer, prompts, [random_features(2)])


@pytest.mark.parametrize(
    ("stage", "width", "remedy"),
    [("projected", 32, "stage='pre_projector'"), ("pre_projector", 48, "stage='projected'")],
)
def test_features_of_the_other_stage_are_refused(llava, tokenizer, stage, width, remedy):
    with pytest.raises(ConfigError, match=f"are {width} wide and the model takes .*{remedy}"):
        prepare(llava, tokenizer, ["is <image>"], [random_features(2, width)], stage=stage)


def test_an_unknown_stage_is_refused(llava, tokenizer):
    with pytest.raises(ConfigError, match="no stage 'layer_2'; known: projected, pre_projector"):
        prepare(llava, tokenizer, ["is <image>"], [random_features(2)], stage="layer_2")


def test_a_model_that_places_images_otherwise_is_refused(tokenizer):
    model = LlamaForCausalLM(LlamaConfig(**text_options()))

    with pytest.raises(ConfigError, match=r"'llama' cannot take cached tokens yet; known: .*llava"):
        prepare(model, tokenizer, ["is <image>"], [random_features(2)])


def test_unprojected_features_of_models_that_do_more_than_project_are_refused(
    llava_onevision, tokenizer
):
    features = [random_features(2, 32)]

    with pytest.raises(ConfigError, match=r"'llava_onevision' do more .* with stage 'projected'"):
        prepare(llava_onevision, tokenizer, ["is <image>"], features, stage="pre_projector")


def test_a_model_whose_prompts_mark_the_rows_of_an_image_is_refused(tokenizer):
    vision = PixtralVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**text_options()), image_token_id=IMAGE
    )

    with pytest.raises(ConfigError, match="tower of type 'pixtral'"):
        prepare(
            build(LlavaForConditionalGeneration, config),
            tokenizer,
            ["is <image>"],
            [random_features(2)],
        )


def test_codes_that_were_not_unpacked_are_refused(llava, tokenizer):
    codes = torch.ones(2, 48, dtype=torch.int8)

    with pytest.raises(ValueError, match=r"image 0 are torch\.int8, expected floating point"):
        prepare(llava, tokenizer, ["is <image>"], [codes])


def test_a_projector_with_integer_weights_is_given_floats(llava, tokenizer, monkeypatch):
    """As a quantised layer takes them: floats in and out, whatever its weights are stored as."""
    linear = llava.base_model.multi_modal_projector.linear_1
    features = random_features(3, 32)
    wanted = prepare(llava, tokenizer, ["is <image>"], [features], stage="pre_projector")
    quantised = IntegerLinear(linear)
    monkeypatch.setattr(llava.base_model.multi_modal_projector, "linear_1", quantised)

    inputs = prepare(llava, tokenizer, ["is <image>"], [features], stage="pre_projector")

    (found,) = inputs["mm_encoder_outputs"]["image"].pooler_output
    (exact,) = wanted["mm_encoder_outputs"]["image"].pooler_output
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, atol=0.02, rtol=0.05)


class IntegerLinear(torch.nn.Module):
    """A linear layer whose weight is stored in 8 bits with one scale."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.scale = linear.weight.detach().abs().max() / 127
        codes = (linear.weight.detach() / self.scale).round().to(torch.int8)
        self.weight = torch.nn.Parameter(codes, requires_grad=False)
        self.bias = linear.bias

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        assert features.is_floating_point()
        weight = self.weight.to(features.dtype) * self.scale
        return torch.nn.functional.linear(features, weight, self.bias)


def test_a_tokenizer_without_a_pad_falls_back_to_its_end_token(llava, tokenizer):
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", pad_token=None
    )

    inputs = prepare(llava, words, ["what is", "dog"], [])

    assert inputs["input_ids"].tolist()[1] == [WORDS.index("</s>"), WORDS.index("dog")]


def test_a_tokenizer_with_nothing_to_pad_with_is_refused(llava, tokenizer):
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, pad_token="<image>"
    )

    with pytest.raises(ConfigError, match=r"set tokenizer\.pad_token"):
        prepare(llava, words, ["what is", "dog"], [])


@dataclass
class PlacedRow:
    features: Tensor
    positions: Tensor
    sizes: Tensor
    grid: tuple[int, int, int] = (1, GRID, GRID)


def placed(positions: list[int], sizes: list[float] | None = None, seed: int = 0) -> PlacedRow:
    """Return some of the 16 tokens of an image."""
    where = torch.tensor(positions)
    weights = torch.tensor(sizes) if sizes else torch.ones(len(positions))
    return PlacedRow(random_features(GRID * GRID, seed=seed)[where], where, weights)


PLACED_PROMPTS = ["what is <image> in this <image> picture answer", "is <image> two cats"]


def placed_rows() -> list[PlacedRow]:
    return [placed([0, 3, 7, 15]), placed([5], seed=1), placed([1, 2, 14], seed=2)]


def logits_of(model, inputs) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits[:, -1]


def test_original_places_equal_full_images_whose_other_tokens_are_masked(llava, tokenizer):
    rows = placed_rows()
    inputs = prepare(llava, tokenizer, PLACED_PROMPTS, rows, placement="original")

    full = [random_features(GRID * GRID, seed=seed) for seed in range(3)]
    masked = prepare(llava, tokenizer, PLACED_PROMPTS, full)
    is_image = masked["input_ids"] == IMAGE
    kept = torch.cat([torch.zeros(16).index_fill(0, row.positions, 1) for row in rows])
    positions = (masked["attention_mask"].cumsum(1) - 1).clamp_min(0)
    masked["attention_mask"][is_image] = kept.long()
    # One of the placed prompts is masked from here on: no position may follow from the mask.
    expected = logits_of(llava, {**masked, "position_ids": positions})

    torch.testing.assert_close(logits_of(llava, inputs), expected, atol=1e-4, rtol=0)
    packed = logits_of(llava, prepare(llava, tokenizer, PLACED_PROMPTS, rows))
    assert (packed - expected).abs().max() > 1e-2


def test_a_weighted_token_counts_as_so_many_equal_tokens(tokenizer):
    """With one layer exactly; in deeper ones a copy would see only those before it."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**vision_options()),
        text_config=LlamaConfig(**{**text_options(), "num_hidden_layers": 1}),
        image_token_id=IMAGE,
    )
    llava = build(LlavaForConditionalGeneration, config)
    row = placed([0, 3, 7, 15], [1.0, 5.0, 2.0, 8.0])
    repeats = row.sizes.long()
    prompt = PLACED_PROMPTS[1:]

    weighted = prepare(llava, tokenizer, prompt, [row], placement="weighted")
    places = prepare(llava, tokenizer, prompt, [row], placement="original")
    ids = places["input_ids"][0]
    times = torch.ones_like(ids).index_put(((ids == IMAGE).nonzero(as_tuple=True)), repeats)
    copied = prepare(llava, tokenizer, prompt, [row.features.repeat_interleave(repeats, dim=0)]) | {
        "position_ids": places["position_ids"].repeat_interleave(times, dim=1)
    }

    expected = logits_of(llava, copied)
    torch.testing.assert_close(logits_of(llava, weighted), expected, atol=1e-4, rtol=0)
    unweighted = prepare(llava, tokenizer, prompt, [row], placement="original")
    assert (logits_of(llava, unweighted) - expected).abs().max() > 1e-2
    said = weighted_generate(llava, weighted, max_new_tokens=5, do_sample=False)
    again = weighted_generate(llava, copied, max_new_tokens=5, do_sample=False)
    new = said[0, weighted["input_ids"].shape[1] :].tolist()
    assert new == again[0, copied["input_ids"].shape[1] :].tolist()


def test_every_placement_of_all_tokens_is_the_same(llava, tokenizer):
    rows = [placed(list(range(16)), seed=seed) for seed in range(3)]
    packed, *others = (
        logits_of(llava, prepare(llava, tokenizer, PLACED_PROMPTS, rows, placement=placement))
        for placement in ("packed", "original", "weighted")
    )

    for other in others:
        torch.testing.assert_close(other, packed, atol=1e-5, rtol=0)


def test_weighted_generate_leaves_nothing_behind(llava, tokenizer):
    prompt, row = PLACED_PROMPTS[1:], placed([0, 3], [4.0, 12.0])
    plain = prepare(llava, tokenizer, prompt, [row])
    before = logits_of(llava, plain)

    inputs = prepare(llava, tokenizer, prompt, [row], placement="weighted")
    weighted_generate(llava, inputs, max_new_tokens=2)

    assert torch.equal(logits_of(llava, plain), before)
    assert "position_bias" in inputs
    for beams in ({"num_beams": 2}, {"generation_config": GenerationConfig(num_beams=2)}):
        with pytest.raises(ConfigError, match="num_beams=1"):
            weighted_generate(llava, inputs, max_new_tokens=2, **beams)


def test_each_of_several_answers_to_weighted_prompts_has_the_weights_of_its_own(llava, tokenizer):
    inputs = prepare(llava, tokenizer, PLACED_PROMPTS, placed_rows(), placement="weighted")
    once = weighted_generate(llava, inputs, max_new_tokens=6, do_sample=False)

    best_alone = {"do_sample": True, "top_k": 1, "num_return_sequences": 3}
    thrice = weighted_generate(llava, inputs, max_new_tokens=6, **best_alone)

    assert len(once) == len(PLACED_PROMPTS) and not torch.equal(once[0], once[1])
    assert torch.equal(thrice, once.repeat_interleave(3, dim=0))


def test_the_bias_is_of_the_dtype_of_the_language_model_whatever_the_projector_is_in(
    llava, tokenizer
):
    """Attention on CUDA refuses, or misreads, a bias of another dtype than its queries'."""
    model = deepcopy(llava).to(torch.bfloat16)
    model.model.multi_modal_projector.float()
    del model.model.vision_tower  # as where the cache is used: the projector's weights come first
    assert model.dtype == torch.float32

    inputs = prepare(model, tokenizer, PLACED_PROMPTS, placed_rows(), placement="weighted")

    assert inputs["position_bias"].dtype == torch.bfloat16


def test_placements_that_cannot_be_are_refused(llava, llava_next, tokenizer):
    prompt, row = PLACED_PROMPTS[1:], placed([0, 3])
    with pytest.raises(ConfigError, match="no placement 'heavy'; known: packed, original, weig"):
        prepare(llava, tokenizer, prompt, [row], placement="heavy")
    with pytest.raises(ConfigError, match=r"'llava_next' see an image in tiles, and this .* none"):
        prepare(llava_next, tokenizer, prompt, [row], placement="original")
    with pytest.raises(TypeError, match="image 0 is a Tensor without positions"):
        prepare(llava, tokenizer, prompt, [row.features], placement="original")
    outside = PlacedRow(row.features, torch.tensor([0, 16]), row.sizes)
    with pytest.raises(ValueError, match="position 16 of a grid"):
        prepare(llava, tokenizer, prompt, [outside], placement="original")


def test_attention_that_would_leave_the_weights_out_is_refused(llava, tokenizer):
    llava.set_attn_implementation("eager")
    try:
        with pytest.raises(ConfigError, match="attn_implementation='sdpa'"):
            prepare(llava, tokenizer, PLACED_PROMPTS[1:], [placed([0])], placement="weighted")
    finally:
        llava.set_attn_implementation("sdpa")
