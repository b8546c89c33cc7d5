"""Answers from shared prefixes equal those of transformers' own generate."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline import encoders
from pipeline.carved_cache import CachedImage
from pipeline.consumers.hf import prepare, weighted_generate
from pipeline.consumers.placement import HasFeatures
from pipeline.errors import ConfigError
from pipeline.evaluation.answers import LanguageModel, PromptBatch, load_model
from pipeline.types import Placement
from tests.encoders.tiny_models import photo, save_vit, upstream_pixels
from tests.evaluation.models import save_model

PROMPTS = [
    ["what is in this picture ?", "how many dogs ?", "how many cats are there left of dogs ?"],
    ["how many dogs ?"],
    ["is this right ?", "w20 w21 w22"],
]
TEMPLATE = "USER: <image> {prompt} ASSISTANT:"
STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_model(path)
    return path


def language_model(folder: Path, **options: Any) -> LanguageModel:
    model, processor = load_model(str(folder))
    settings = {"stage": "projected", "template": TEMPLATE, "max_new_tokens": STEPS, **options}
    return LanguageModel(model=model, processor=processor, **settings)


@pytest.fixture(scope="module")
def asked(folder: Path) -> LanguageModel:
    return language_model(folder)


def features(counts: list[int], width: int = 24, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(count, width, generator=generator) for count in counts]


def expected(
    language: LanguageModel,
    prompts: list[list[str]],
    carved: Sequence[Tensor | HasFeatures],
    placement: Placement = "packed",
) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, first logits and last hidden states of generate, prompt after prompt."""
    tokens, logits, hidden = [], [], []
    for own, image in zip(prompts, carved, strict=True):
        for prompt in own:
            text = language.template.replace("{prompt}", prompt)
            given = (language.model, language.processor, [text], [image])
            inputs = prepare(*given, stage=language.stage, placement=placement)
            with torch.inference_mode():
                plain = language.model(**inputs, output_hidden_states=True)
            inputs = prepare(*given, stage=language.stage, placement=placement)
            said = weighted_generate(
                language.model, inputs, max_new_tokens=language.max_new_tokens, do_sample=False
            )[0, inputs["input_ids"].shape[1] :].tolist()
            ends = language.model.generation_config.eos_token_id
            ends = ends if isinstance(ends, list) else [ends]
            said = said[: next((i for i, t in enumerate(said) if t in ends), len(said))]
            tokens.append(said + [-1] * (language.max_new_tokens - len(said)))
            logits.append(plain.logits[0, -1])
            hidden.append(plain.hidden_states[-1][0, -1])
    return torch.tensor(tokens), torch.stack(logits), torch.stack(hidden)


@pytest.mark.parametrize("counts", [[16, 16, 16], [16, 3, 9], [1, 2, 1]])
def test_answers_logits_and_hidden_states_equal_those_of_generate(
    asked: LanguageModel, counts: list[int]
) -> None:
    carved = features(counts)

    answers = asked.ask(asked.lay_out(PROMPTS), carved)

    tokens, logits, hidden = expected(asked, PROMPTS, carved)
    assert answers.tokens.tolist() == tokens.tolist()
    torch.testing.assert_close(answers.logits, logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(answers.hidden, hidden, atol=1e-4, rtol=0)
    assert len({tuple(row) for row in tokens.tolist()}) > 1  # the answers differ


@pytest.mark.parametrize("placement", ["original", "weighted"])
@pytest.mark.parametrize("template", [TEMPLATE, "{prompt} <image> ASSISTANT:"])
def test_placed_tokens_are_answered_as_generate_does(
    folder: Path, placement: Placement, template: str
) -> None:
    language = language_model(folder, template=template)
    counts = [5, 16, 3]
    carved = [
        CachedImage(
            key="",
            features=features_KD,
            positions=torch.randperm(16, generator=torch.Generator().manual_seed(n))[:n].sort()[0],
            sizes=1.0 + torch.arange(n),
            ranks=torch.arange(n),
            grid=(1, 4, 4),
            width=28,
            height=28,
        )
        for n, features_KD in zip(counts, features(counts), strict=True)
    ]

    answers = language.ask(language.lay_out(PROMPTS), carved, placement=placement)

    tokens, logits, hidden = expected(language, PROMPTS, carved, placement)
    assert answers.tokens.tolist() == tokens.tolist()
    torch.testing.assert_close(answers.logits, logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(answers.hidden, hidden, atol=1e-4, rtol=0)
    packed = language.ask(language.lay_out(PROMPTS), carved)
    assert (answers.logits - packed.logits).abs().max() > 1e-2


def test_answers_end_where_generate_ends_them(tmp_path: Path) -> None:
    save_model(tmp_path, ends=list(range(20, 40)), never=list(range(44, 64)))
    language = language_model(tmp_path)
    carved = features([5, 7, 4], seed=1)

    answers = language.ask(language.lay_out(PROMPTS), carved)

    tokens, _, _ = expected(language, PROMPTS, carved)
    assert answers.tokens.tolist() == tokens.tolist()
    assert {int((row >= 0).sum()) for row in tokens} - {STEPS}  # some end early


def test_prompts_that_differ_before_the_image_are_answered_too(folder: Path) -> None:
    language = language_model(folder, template="{prompt} <image> ASSISTANT:")
    carved = features([4, 6, 5])

    answers = language.ask(language.lay_out(PROMPTS), carved)

    tokens, logits, _ = expected(language, PROMPTS, carved)
    assert answers.tokens.tolist() == tokens.tolist()
    torch.testing.assert_close(answers.logits, logits, atol=1e-4, rtol=0)


def test_features_before_the_projector_go_through_it(folder: Path) -> None:
    language = language_model(folder, stage="pre_projector")
    carved = features([4, 6, 5], width=32)

    answers = language.ask(language.lay_out(PROMPTS), carved)

    assert answers.tokens.tolist() == expected(language, PROMPTS, carved)[0].tolist()


def test_an_image_is_answered_alike_alone_and_in_a_batch(asked: LanguageModel) -> None:
    carved = features([9, 3, 14])

    together = asked.ask(asked.lay_out(PROMPTS), carved)
    alone = asked.ask(asked.lay_out(PROMPTS[2:]), carved[2:])

    assert together.tokens[-2:].tolist() == alone.tokens.tolist()
    torch.testing.assert_close(together.logits[-2:], alone.logits, atol=1e-5, rtol=0)


def test_all_tokens_answer_as_the_pixels_do(folder: Path) -> None:
    language = language_model(folder)
    options = {"model": str(folder), "stage": "projected", "resize": "pillow"}
    encoder = encoders.build("llava", options)
    encoder.load()
    images = [photo("coffee"), photo("chelsea"), photo("coffee")[:200, :200]]
    (tokens,) = encoder.encode(images)

    answers = language.ask(language.lay_out(PROMPTS), list(tokens.features))

    logits = []
    for own, pixels in zip(PROMPTS, upstream_pixels(folder, images), strict=True):
        for prompt in own:
            text = TEMPLATE.replace("{prompt}", prompt).replace("<image>", " <image>" * 16)
            ids = torch.tensor([language.processor.tokenizer(text)["input_ids"]])
            with torch.inference_mode():
                out = language.model(input_ids=ids, pixel_values=pixels[None])
            logits.append(out.logits[0, -1])
    torch.testing.assert_close(answers.logits, torch.stack(logits), atol=1e-4, rtol=0)


def test_a_checkpoint_with_a_chat_template_is_asked_by_it(folder: Path) -> None:
    model, processor = load_model(str(folder))
    processor.chat_template = (
        "<s>{% for m in messages %}USER: {% for c in m.content %}{% if c.type == 'image' %}"
        "<image> {% else %}{{ c.text }}{% endif %}{% endfor %} ASSISTANT:{% endfor %}"
    )

    language = LanguageModel(
        model=model, processor=processor, stage="projected", template="", max_new_tokens=1
    )

    assert language.template == TEMPLATE


def test_a_prompt_with_an_image_token_of_its_own_is_refused(asked: LanguageModel) -> None:
    with pytest.raises(ConfigError, match="must hold the image token once"):
        asked.lay_out([["what is <image> ?"]])


def test_a_checkpoint_that_takes_no_images_is_refused(tmp_path: Path) -> None:
    save_vit(tmp_path, "clip")

    with pytest.raises(ConfigError, match="cannot be evaluated; known: llava"):
        load_model(str(tmp_path))


def test_a_laid_out_batch_stands_for_a_tokenizer(asked: LanguageModel) -> None:
    batch: PromptBatch = asked.lay_out(PROMPTS)

    lengths = [len(prefix) for prefix in batch(["0", "1", "2"])["input_ids"]]

    # <s> USER: <image>; alone, a prompt shares all but its last token with itself.
    assert lengths == [3, 7, 3]
