import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pipeline.carvers._information import contributions
from pipeline.errors import ConfigError, NonFiniteError
from pipeline.evaluation._decoder import columns_of
from pipeline.evaluation.online_tokencarve import carve_hidden, read_prompts

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "tokencarve"
CASES = json.loads((GOLDEN / "cases.json").read_text())
WEIGHTS = {"information": 0.0, "attention": 1.0}
MODES = ["both", "information", "attention", "norm"]
IMAGE, PAD, END = 63, 0, 2
WIDTH, NUM_IMAGE = 48, 20


def build(num_layers: int = 4, **text) -> LlavaForConditionalGeneration:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=7,
        ),
        text_config=LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            bos_token_id=1,
            eos_token_id=END,
            pad_token_id=PAD,
            **text,
        ),
        image_token_id=IMAGE,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    # Weights of a real spread: at the default 0.02 an image hardly moves a logit.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0 if parameter.ndim > 1 else 1.0)
    return model


@pytest.fixture(scope="module")
def model():
    return build()


def image(seed: int = 0, num_tokens: int = NUM_IMAGE) -> Tensor:
    return torch.randn(num_tokens, WIDTH, generator=torch.Generator().manual_seed(seed))


def prompt(before: list[int], behind: list[int], num_tokens: int = NUM_IMAGE) -> list[int]:
    return [*before, *[IMAGE] * num_tokens, *behind]


def batch(prompts: list[list[int]], *, left: bool = True) -> tuple[Tensor, Tensor]:
    """Return padded ids and the mask."""
    length = max(map(len, prompts))
    pads = [[PAD] * (length - len(ids)) for ids in prompts]
    rows = [p + ids if left else ids + p for p, ids in zip(pads, prompts, strict=True)]
    marks = [
        [0] * len(p) + [1] * len(ids) if left else [1] * len(ids) + [0] * len(p)
        for p, ids in zip(pads, prompts, strict=True)
    ]
    return torch.tensor(rows), torch.tensor(marks)


def ask(model, prompts, images, *, left=True, **options):
    options = {"keep_tokens": 6, "mode": "both", "max_new_tokens": 6, **options}
    return read_prompts(model, *batch(prompts, left=left), images).answer(**options)


RAGGED = [
    prompt([1, 5, 6], [7, 8, 9, 10, 11]),
    prompt([1, 5, 6], [12, 13]),
    prompt([1, 20, 21, 22, 23], [14, 15, 16, 17]),
    prompt([], [18]),
    prompt([1, 40, 6], [7, 8, 9]),
]
SHARED, OTHER, THIRD = image(0), image(1), image(2)
IMAGES = [SHARED, SHARED, OTHER, THIRD, SHARED]


# The published form once more, in float64, from its description: one prompt, no cache, every layer
# on the sequence of rows it sees, loops in place of tensors.


def turn(rows: Tensor, positions: list[int], theta: float) -> Tensor:
    """Rotate (T, d) rows to their positions."""
    half = rows.shape[1] // 2
    angles = torch.tensor(positions).double()[:, None] * theta ** (-torch.arange(half) / half)
    left, right = rows[:, :half], rows[:, half:]
    turned = [
        left * angles.cos() - right * angles.sin(),
        right * angles.cos() + left * angles.sin(),
    ]
    return torch.cat(turned, dim=1)


def layer_output(model, index, rows, positions, num_queries) -> tuple[Tensor, Tensor]:
    """Return the last rows behind a layer, and (heads, queries, rows) what they attend to."""
    decoder = model.model.language_model
    layer, config = decoder.layers[index], decoder.config
    theta, attention = config.rope_parameters["rope_theta"], layer.self_attn
    normed = layer.input_layernorm(rows)
    asking = normed[-num_queries:]
    heads, width = config.num_attention_heads, attention.head_dim
    shared = heads // config.num_key_value_heads
    outputs, weights = [], []
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        key_head = slice(head // shared * width, (head // shared + 1) * width)
        queries = turn(attention.q_proj(asking)[:, own], positions[-num_queries:], theta)
        keys = turn(attention.k_proj(normed)[:, key_head], positions, theta)
        logits = queries @ keys.T / width**0.5
        for query in range(num_queries):
            logits[query, len(rows) - num_queries + query + 1 :] = -torch.inf
        weights.append(logits.softmax(dim=1))
        outputs.append(weights[-1] @ attention.v_proj(normed)[:, key_head])
    middle = rows[-num_queries:] + attention.o_proj(torch.cat(outputs, dim=1))
    return middle + layer.mlp(layer.post_attention_layernorm(middle)), torch.stack(weights)


def points(scores: Tensor) -> list[int]:
    """Return N for the best score, down to 1 for the worst."""
    best_first = sorted(range(len(scores)), key=lambda i: -float(scores[i]))
    return [len(scores) - best_first.index(i) for i in range(len(scores))]


def select(hidden: Tensor, attention: Tensor, keep_tokens: int, mode: str) -> dict[int, Tensor]:
    """Return the kept rows by position."""
    left, singular, _ = torch.linalg.svd(hidden)
    information = (left[:, : len(singular)] @ torch.diag(singular)).abs().sum(dim=1)
    if mode == "norm":
        information = (hidden**2).sum(dim=1).sqrt()
    weight = {"both": 0.5, "norm": 0.5, "information": 0.0, "attention": 1.0}[mode]
    by_attention, by_information = points(attention), points(information)
    score = [
        weight * a + (1 - weight) * i for a, i in zip(by_attention, by_information, strict=True)
    ]
    order = sorted(range(len(score)), key=lambda i: (-score[i], i))[: int(1.5 * keep_tokens)]
    targets, others = order[: len(order) // 2], order[len(order) // 2 :]
    cosine = torch.nn.functional.cosine_similarity
    nearest = {
        other: max(
            (float(cosine(hidden[other], hidden[target], dim=0)), target) for target in targets
        )
        for other in others
        if targets
    }
    most_similar = sorted(nearest, key=lambda other: -nearest[other][0])
    gone = most_similar[: min(len(targets), keep_tokens // 2)]
    kept = {}
    for position in sorted(set(order) - set(gone)):
        members = [position, *(o for o in gone if nearest[o][1] == position)]
        kept[position] = hidden[members].mean(dim=0)
    return kept


def slow_logits(model, ids, features, answer, keep_tokens, mode) -> Tensor:
    """Return the logits behind a prompt and the answer so far, computed from the start."""
    decoder = model.model.language_model
    start, num_image = ids.index(IMAGE), len(features)
    rows = decoder.embed_tokens(torch.tensor(ids))
    rows[start : start + num_image] = features
    positions = list(range(len(ids)))
    inputs = []
    for index in range(2):
        inputs.append(rows)
        rows, weights = layer_output(model, index, rows, positions, len(ids))
    paid = weights[:, -1, start : start + num_image].mean(dim=0)
    kept = select(rows[start : start + num_image], paid, keep_tokens, mode)
    columns = [*range(start), *(start + p for p in kept), *range(start + num_image, len(ids))]
    rows = torch.stack([kept[c - start] if c - start in kept else rows[c] for c in columns])
    inputs = [before[columns] for before in inputs]
    new = decoder.embed_tokens(torch.tensor(answer, dtype=torch.long))
    positions = columns + [len(ids) + i for i in range(len(answer))]
    for index in range(2):
        if answer:
            seen = torch.cat([inputs[index], new])
            new, _ = layer_output(model, index, seen, positions, len(answer))
    rows = torch.cat([rows, new])
    for index in range(2, len(decoder.layers)):
        rows, _ = layer_output(model, index, rows, positions, len(rows))
    return model.lm_head(decoder.norm(rows[-1]))


def slow_answer(model, ids, features, *, keep_tokens, mode, max_new_tokens):
    """Return the new tokens and the logits of each."""
    model = copy.deepcopy(model).double()
    answer, every = [], []
    while len(answer) < max_new_tokens and END not in answer:
        every.append(slow_logits(model, ids, features.double(), answer, keep_tokens, mode))
        answer.append(int(every[-1].argmax()))
    return answer, every


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("keep_tokens", [1, 2, 5, 13])
def test_it_equals_a_literal_account_without_a_cache(model, keep_tokens, mode):
    answers = ask(model, RAGGED, IMAGES, keep_tokens=keep_tokens, mode=mode, max_new_tokens=3)

    for row, (ids, features) in enumerate(zip(RAGGED, IMAGES, strict=True)):
        tokens, logits = slow_answer(
            model, ids, features, keep_tokens=keep_tokens, mode=mode, max_new_tokens=3
        )
        assert answers.tokens[row] == tokens
        assert_close(answers.first_logits[row], logits[0].float(), rtol=0, atol=1e-4)


def upstream(model, prompts, images):
    ids, mask = batch(prompts)
    features = BaseModelOutputWithPooling(pooler_output=list(images))
    return {"input_ids": ids, "attention_mask": mask, "mm_encoder_outputs": {"image": features}}


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("keep_tokens", [NUM_IMAGE, NUM_IMAGE + 5])
@pytest.mark.parametrize("mode", ["both", "attention"])
def test_keeping_every_token_gives_what_generate_gives(model, attention, keep_tokens, mode):
    model = copy.deepcopy(model)
    model.set_attn_implementation(attention)
    length = len(batch(RAGGED)[0][0])
    expected = model.generate(
        **upstream(model, RAGGED, IMAGES), max_new_tokens=9, min_new_tokens=9, do_sample=False
    )
    plain = model(**upstream(model, RAGGED, IMAGES), output_hidden_states=True)
    model.generation_config.eos_token_id = None

    answers = ask(model, RAGGED, IMAGES, keep_tokens=keep_tokens, mode=mode, max_new_tokens=9)

    assert END not in expected[:, length:]
    assert answers.tokens == expected[:, length:].tolist()
    assert_close(answers.first_logits, plain.logits[:, -1], rtol=0, atol=1e-4)
    assert_close(answers.last_hidden, plain.hidden_states[-1][:, -1], rtol=0, atol=1e-4)
    assert answers.positions.tolist() == [list(range(NUM_IMAGE))] * len(RAGGED)


@torch.no_grad()
@pytest.mark.parametrize("several", [False, True])
def test_an_answer_ends_with_its_end_token(model, several):
    model = copy.deepcopy(model)
    model.generation_config.eos_token_id = None
    free = ask(model, RAGGED, IMAGES, max_new_tokens=8).tokens
    end = free[0][3]
    model.generation_config.eos_token_id = [61, end] if several else end

    answers = ask(model, RAGGED, IMAGES, max_new_tokens=8).tokens

    expected = [row[: row.index(end) + 1] if end in row else row for row in free]
    assert answers == expected
    assert len(answers[0]) < 8 == max(map(len, answers))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_selection_equals_that_of_the_published_code(case):
    stored = load_file(GOLDEN / f"{case['name']}.safetensors")
    hidden = stored["hidden_states"][None]

    features, positions = carve_hidden(
        hidden,
        contributions(hidden),
        stored["attention_last_query"].mean(dim=0)[None],
        keep_tokens=case["keep_tokens"],
        attention_weight=WEIGHTS.get(case["mode"], case["attention_weight"]),
    )

    assert torch.equal(positions[0], stored["positions"].long())
    assert_close(features[0], stored["features"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("left", [True, False])
def test_padding_and_batch_mates_change_no_answer(model, left, mode):
    together = ask(model, RAGGED, IMAGES, left=left, mode=mode)

    alone = [ask(model, [p], [i], mode=mode) for p, i in zip(RAGGED, IMAGES, strict=True)]
    assert together.tokens == [answers.tokens[0] for answers in alone]
    assert torch.equal(together.positions, torch.cat([answers.positions for answers in alone]))
    for name in ("first_logits", "last_hidden"):
        single = torch.cat([getattr(answers, name) for answers in alone])
        assert_close(getattr(together, name), single, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_takes_padding(model, dtype):
    half = copy.deepcopy(model).to(dtype)

    together = ask(half, RAGGED, IMAGES, mode="attention")

    alone = torch.cat(
        [
            ask(half, [p], [i], mode="attention").first_logits
            for p, i in zip(RAGGED, IMAGES, strict=True)
        ]
    )
    assert together.first_logits.dtype == torch.float32
    assert together.last_hidden.dtype == dtype
    assert bool(together.first_logits.isfinite().all())
    assert_close(together.first_logits, alone, rtol=0, atol=0.1 * float(alone.abs().max()))


def test_a_token_sees_the_tokens_up_to_itself_and_every_column_sees_something():
    columns = columns_of(torch.tensor([[False, True, True, False, True]]))

    visible = columns.mask(3, torch.float16)[0, 0] == 0

    # The second of them is padding, and sees more than it would need to.
    assert visible.int().tolist() == [[0, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0, 1, 1, 0, 1]]
    assert columns.positions.tolist() == [[0, 0, 1, 1, 2]]


def test_the_question_decides_what_is_kept(model):
    prompts = [prompt([1, 5], [7, 8]), prompt([1, 5], [30, 31])]

    by_attention = ask(model, prompts, [SHARED] * 2, mode="attention").positions
    by_information = ask(model, prompts, [SHARED] * 2, mode="information").positions

    assert not torch.equal(by_attention[0], by_attention[1])
    assert torch.equal(by_information[0], by_information[1])


def test_the_norm_control_ranks_by_the_euclidean_norm_and_by_attention(model):
    read = read_prompts(model, *batch(RAGGED[:1]), IMAGES[:1])
    hidden = torch.zeros(1, NUM_IMAGE, WIDTH)
    # Rows along axes, but one that lies along all of them: it adds to every singular direction,
    # and is shorter than most.
    hidden[0, :, :NUM_IMAGE] = torch.diag(torch.linspace(1, 2, NUM_IMAGE))
    hidden[0, 7] = 0.0
    hidden[0, 7, :NUM_IMAGE] = 0.25
    attention = torch.linspace(1.0, 0.9, NUM_IMAGE).roll(7)[None]
    read = dataclasses.replace(read, image_hidden=hidden, attention=attention)

    by_norm = read.answer(keep_tokens=1, mode="norm", max_new_tokens=1).positions
    by_information = read.answer(keep_tokens=1, mode="both", max_new_tokens=1).positions

    norms, paid = hidden[0].norm(dim=1), read.attention[0]
    total = [a + b for a, b in zip(points(norms), points(paid), strict=True)]
    assert by_norm.tolist() == [[total.index(max(total))]]
    assert by_norm.tolist() != by_information.tolist()


def test_prompts_on_one_image_share_its_first_layers(model):
    prompts = [prompt([1, 5, 6], [7 + i, 8]) for i in range(5)]
    stacked = torch.stack([SHARED, OTHER])
    images = [stacked[i] for i in (0, 1, 0, 0, 1)]
    rows = []
    layer = model.model.language_model.layers[0]
    handle = layer.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[:2]))

    shared = ask(model, prompts, images, max_new_tokens=1)
    handle.remove()

    assert rows == [(2, 3 + NUM_IMAGE), (5, 2)]
    apart = ask(model, prompts, [features.clone() for features in images])
    assert_close(shared.first_logits, apart.first_logits, rtol=0, atol=1e-4)
    assert torch.equal(shared.positions, apart.positions)


def test_prompts_read_once_answer_like_prompts_read_for_each_budget(model):
    read = read_prompts(model, *batch(RAGGED), IMAGES)

    for keep_tokens, mode in [(9, "both"), (3, "norm"), (9, "both")]:
        again = read.answer(keep_tokens=keep_tokens, mode=mode, max_new_tokens=4)
        fresh = ask(model, RAGGED, IMAGES, keep_tokens=keep_tokens, mode=mode, max_new_tokens=4)
        assert again.tokens == fresh.tokens
        assert torch.equal(again.first_logits, fresh.first_logits)


def test_a_decoder_of_two_layers_is_carved_for_its_answer_only():
    model = build(num_layers=2)

    one = ask(model, RAGGED, IMAGES, keep_tokens=1)
    every = ask(model, RAGGED, IMAGES, keep_tokens=NUM_IMAGE)

    # The first token comes out of two layers that see the whole image, the next ones do not.
    assert torch.equal(one.first_logits, every.first_logits)
    assert one.tokens != every.tokens


def test_more_than_one_image_run_is_refused(model):
    ids = [1, *[IMAGE] * 4, 5, *[IMAGE] * (NUM_IMAGE - 4), 6]

    with pytest.raises(ValueError, match=r"prompt 0 has 20 image tokens .* expected one run of 20"):
        read_prompts(model, *batch([ids]), [SHARED])


@pytest.mark.parametrize("num_tokens", [0, NUM_IMAGE - 1, NUM_IMAGE + 1])
def test_as_many_image_tokens_as_features_are_wanted(model, num_tokens):
    prompts = [RAGGED[0], prompt([1], [5], num_tokens)]

    with pytest.raises(ValueError, match=f"prompt 1 has {num_tokens} image tokens"):
        read_prompts(model, *batch(prompts), IMAGES[:2])


def test_a_prompt_without_a_question_is_refused(model):
    with pytest.raises(ValueError, match="prompt 0 ends with its image"):
        read_prompts(model, *batch([prompt([1], [])]), [SHARED])


@pytest.mark.parametrize("count", [0, 1, 3])
def test_one_image_per_prompt_is_wanted(model, count):
    with pytest.raises(ValueError, match=f"2 prompts and {count} images"):
        read_prompts(model, *batch(RAGGED[:2]), [SHARED] * count)


@pytest.mark.parametrize(
    "features",
    [torch.zeros(NUM_IMAGE, WIDTH + 1), torch.zeros(NUM_IMAGE), torch.zeros(NUM_IMAGE - 1, WIDTH)],
)
def test_features_of_another_shape_are_refused(model, features):
    with pytest.raises(ValueError, match=r"expected one \(N, 48\) for all"):
        read_prompts(model, *batch(RAGGED[:2]), [SHARED, features])


def test_hidden_states_that_are_not_finite_are_reported(model):
    broken = SHARED.clone()
    broken[3, 0] = torch.nan

    with pytest.raises(NonFiniteError, match=r"output of decoder layer 2 of image \[1\]"):
        read_prompts(model, *batch(RAGGED[:3]), [SHARED, broken, SHARED])


def test_other_models_are_refused(model):
    for changed, message in [
        ({"model_type": "llava_next"}, "the model is 'llava_next' with 'llama'"),
        ({"num_hidden_layers": 1}, "carves after layer 2, the decoder has 1"),
        ({"_attn_implementation": "flash_attention_2"}, "takes no mask of any shape"),
    ]:
        other = copy.deepcopy(model)
        for name, value in changed.items():
            target = other.config if name == "model_type" else other.config.text_config
            object.__setattr__(target, name, value)
        with pytest.raises(ConfigError, match=message):
            read_prompts(other, *batch(RAGGED), IMAGES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_tokens": 0}, "keep_tokens"),
        ({"mode": "svd"}, "no mode 'svd'; known: both, information, attention, norm"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_wrong_options_are_refused(model, options, message):
    with pytest.raises(ValueError, match=message):
        ask(model, RAGGED, IMAGES, **options)
