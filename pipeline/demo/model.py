"""A tiny LLaVA with untrained weights, saved as any checkpoint is, and answers drawn from it.

It has every part of the real thing (CLIP tower, projector, Llama, tokenizer, processor) and goes
through the code that loads real checkpoints. Its weights are drawn from a seed, not learnt: which
tokens it keeps follows the contrast in an image, and what it says about one means nothing.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.utils import logging

from pipeline.consumers.hf import prepare

PROMPT = "USER: <image>\nDescribe the image in detail. ASSISTANT:"
IMAGE_EDGE, PATCH_EDGE = 224, 16  # pixels: 14 x 14 tokens
WIDTH = 128  # of the tower and of the language model

_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
_PAD, _BOS, _EOS, _UNK, _IMAGE = range(len(_SPECIAL))
_WORD = re.compile(r"\w+|[^\w\s]")
_QUERY_KEY_GAIN = 2.0  # attention as peaked as in a trained tower, not flat


def save_model(folder: Path, *, captions: Iterable[str], seed: int = 0) -> None:
    """Write model, tokenizer and processor; the same bytes for the same arguments.

    Args:
        folder: made if it does not exist.
        captions: whose words the tokenizer knows.
        seed: of the weights.
    """
    tokenizer = _build_tokenizer(captions)
    with torch.random.fork_rng(devices=[]):  # building a model draws weights, replaced below
        model = LlavaForConditionalGeneration(_config(len(tokenizer)))
    _draw_weights(model, seed)
    model.generation_config = GenerationConfig(
        bos_token_id=_BOS,
        eos_token_id=_EOS,
        pad_token_id=_PAD,
        suppress_tokens=[_PAD, _BOS, _UNK, _IMAGE],  # what no trained model would say
        do_sample=False,
    )
    with _no_progress_bars():
        model.save_pretrained(folder)
    edges = {"height": IMAGE_EDGE, "width": IMAGE_EDGE}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": IMAGE_EDGE}, crop_size=edges),
        tokenizer=tokenizer,
        patch_size=PATCH_EDGE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


def answer_both_ways(
    folder: Path,
    images: Sequence[Image.Image],
    carved: Sequence[Tensor],
    *,
    num_words: int = 12,
) -> list[tuple[str, str]]:
    """Ask the model about each image twice: with its pixels, and with cached tokens instead.

    Args:
        folder: a checkpoint.
        images: RGB.
        carved: for each image its (K, D) projected features, as a cache gives them.
        num_words: length of an answer.

    Returns:
        For each image the answer from all tokens and the one from the carved tokens.
    """
    with _no_progress_bars():
        model: Any = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    processor: Any = AutoProcessor.from_pretrained(folder)
    prompts = [PROMPT] * len(images)
    from_pixels = processor(images=list(images), text=prompts, return_tensors="pt")
    from_cache = prepare(model, processor, prompts, carved, stage="projected")
    answers = [_generate(model, processor, i, num_words) for i in (from_pixels, from_cache)]
    return list(zip(*answers, strict=True))


def _generate(model: Any, processor: Any, inputs: Any, num_words: int) -> list[str]:  # noqa: ANN401
    with torch.inference_mode():
        output = model.generate(**inputs, min_new_tokens=num_words, max_new_tokens=num_words)
    answers = output[:, inputs["input_ids"].shape[1] :]
    return [str(t) for t in processor.batch_decode(answers, skip_special_tokens=True)]


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep transformers' bars off the terminal: this model is read in no time."""
    were_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            logging.enable_progress_bar()


def _config(vocab_size: int) -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_EDGE,
        patch_size=PATCH_EDGE,
    )
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=_BOS,
        eos_token_id=_EOS,
        pad_token_id=_PAD,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=_IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def _build_tokenizer(captions: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words in lower case: those of the captions and the prompt."""
    texts = (*captions, PROMPT.replace(_SPECIAL[_IMAGE], ""))
    words = sorted({word for text in texts for word in _WORD.findall(text.lower())})
    vocabulary = {word: number for number, word in enumerate([*_SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=_SPECIAL[_UNK]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", _BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=_SPECIAL[_PAD],
        bos_token=_SPECIAL[_BOS],
        eos_token=_SPECIAL[_EOS],
        unk_token=_SPECIAL[_UNK],
        additional_special_tokens=[_SPECIAL[_IMAGE]],
        padding_side="left",
    )


def _draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Give every weight its value: noise that keeps the variance of what goes through it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1 and "class_embedding" not in name:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)  # biases, scales of norms
                continue
            fan_in = 1 if "embed_tokens" in name else math.prod(weight.shape[1:])
            gain = _QUERY_KEY_GAIN if "q_proj" in name or "k_proj" in name else 1.0
            weight.copy_(torch.randn(weight.shape, generator=generator) * gain / fan_in**0.5)
