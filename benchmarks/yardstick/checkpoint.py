"""The yardstick's model, a LLaVA of CLIP tower, projector and Llama, and its tokenizer."""

from pathlib import Path

from targets import PATCH
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from pipeline.demo.quiz import GLYPHS, MAX_COUNT, PLACES, SIDES
from pipeline.demo.quiz_drawing import COLORS, EDGE, PATTERNS, SHAPES

WIDTH = 192
TOWER_LAYERS, TEXT_LAYERS = 6, 5

SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
PAD, BOS, EOS, UNK, IMAGE = range(len(SPECIAL))
_WORDS = "read the plate that is at what color pattern on count every where from number in line"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words of the questions and of single letters and digits."""
    places = [word for place in PLACES for word in place.split()]
    counts = [str(number) for number in range(1, MAX_COUNT + 1)]
    words = dict.fromkeys(
        [*_WORDS.split(), *COLORS, *SHAPES, *PATTERNS, *places, *SIDES, *GLYPHS, *counts]
    )
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[UNK]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+"), "removed")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[PAD],
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        unk_token=SPECIAL[UNK],
        additional_special_tokens=[SPECIAL[IMAGE]],
        padding_side="left",
    )


def vision_config() -> CLIPVisionConfig:
    """Return the tower: 12 x 12 patches and a class token."""
    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=TOWER_LAYERS,
        num_attention_heads=6,
        image_size=EDGE,
        patch_size=PATCH,
        hidden_act="gelu",
    )


def build_model(vocab_size: int) -> LlavaForConditionalGeneration:
    """Return the whole model with random weights, drawn from torch's generator."""
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=WIDTH,
        intermediate_size=512,
        num_hidden_layers=TEXT_LAYERS,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=1024,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        tie_word_embeddings=True,
    )
    config = LlavaConfig(
        vision_config=vision_config(),
        text_config=text,
        image_token_index=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        # On a CPU the fused kernel's backward pass is the slower one where nothing is masked.
        attn_implementation={"vision_config": "eager", "text_config": "sdpa"},
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False
    )
    return model


def save_checkpoint(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write the model in its dtype, its tokenizer and its processor."""
    model.save_pretrained(folder)
    edges = {"height": EDGE, "width": EDGE}
    LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": EDGE}, crop_size=edges),
        tokenizer=build_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
