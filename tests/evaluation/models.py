"""A tiny LLaVA of random weights that can be asked questions."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import GenerationConfig, PreTrainedTokenizerFast

from tests.encoders.tiny_models import IMAGE_ID, save_llava

WORDS = "what is in this picture how many dogs and cats are there ? left of right USER: ASSISTANT:"
END = 2


def save_model(path: Path, *, ends: int | list[int] = END, never: list[int] | None = None) -> None:
    """Write a model whose tokenizer can pad; every id below 64 is a word."""
    model: Any = save_llava(path)
    with torch.no_grad():  # at the spread of `save_llava` one word would win every time
        model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(3))
    model.generation_config = GenerationConfig(
        bos_token_id=1, eos_token_id=ends, pad_token_id=0, suppress_tokens=never
    )
    model.save_pretrained(path)
    save_words(path)


def save_words(path: Path) -> None:
    words = ["<pad>", "<s>", "</s>", "<unk>", *WORDS.split()]
    words += [f"w{number}" for number in range(len(words), 64)]
    words[IMAGE_ID] = "<image>"
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
    ).save_pretrained(path)
