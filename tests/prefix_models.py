"""Models with random weights, questions, and caches of their tokens, for the tests of prefixes."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)

from pipeline import codecs
from pipeline.cache.commit import Commit, claim_identity, try_commit
from pipeline.cache.snapshot import build_snapshot
from pipeline.cache.writer import RowToWrite, ShardWriter
from pipeline.storage import Store
from pipeline.types import ShardRef, TileLayout

WORDS = [
    *["<pad>", "<s>", "</s>", "<image>", "what", "is", "in", "this", "picture", "answer"],
    *["two", "cats", "and", "a", "dog"],
]
IMAGE = WORDS.index("<image>")
WIDTH = 48
PROMPT = "what is <image> in"
QUESTIONS = [" this picture answer", " two", " a dog and cats"]
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FP32 = codecs.build("fp32", {})


@dataclass
class Row:
    """As a cache gives it."""

    features: torch.Tensor
    positions: torch.Tensor
    sizes: torch.Tensor
    ranks: torch.Tensor
    grid: tuple[int, int, int] = (1, 4, 4)
    tiles: TileLayout | None = None


def row(positions: list[int], *, sizes: list[float] | None = None, seed: int = 0) -> Row:
    generator = torch.Generator().manual_seed(seed)
    return Row(
        features=torch.randn(len(positions), WIDTH, generator=generator),
        positions=torch.tensor(positions),
        sizes=torch.tensor(sizes) if sizes else torch.ones(len(positions)),
        ranks=torch.randperm(len(positions), generator=generator),
    )


def rows() -> list[Row]:
    return [
        row([0, 3, 7, 15], sizes=[1.0, 5.0, 2.0, 8.0]),
        row([5], seed=1),
        row([1, 2, 14], sizes=[3.0, 1.0, 1.0], seed=2),
    ]


def build_model(kind: str = "llava", **text: Any) -> Any:
    """Return a model whose logits an image moves: weights of a real spread."""
    llama, qwen = LlamaConfig(**{**TEXT, **text}), Qwen2Config(**{**TEXT, **text})
    clip, siglip = CLIPVisionConfig(**VISION), SiglipVisionConfig(**VISION)
    tiles = {"image_grid_pinpoints": [[28, 56]], "image_token_id": IMAGE}
    torch.manual_seed(0)
    if kind == "llava":
        config = LlavaConfig(vision_config=clip, text_config=llama, image_token_id=IMAGE)
        model = LlavaForConditionalGeneration(config)
    elif kind == "llava_next":
        config = LlavaNextConfig(vision_config=clip, text_config=llama, **tiles)
        model = LlavaNextForConditionalGeneration(config)
    else:
        config = LlavaOnevisionConfig(vision_config=siglip, text_config=qwen, **tiles)
        model = LlavaOnevisionForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
    return model.eval()


def build_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )


def claim_cache(store: Store, *, width: int = WIDTH, encoder: dict[str, Any] | None = None) -> None:
    settings = {
        "encoder": encoder or {"name": "llava", "stage": "projected"},
        "carver": {"name": "uniform_grid", "options": {}},
        "codec": {"name": "fp32", "options": {}},
        "width": width,
    }
    claim_identity(store, {"fingerprint": "0" * 16, "settings": settings, "nested": True})


def add_shard(
    store: Store,
    shard_id: str,
    keys: Sequence[str],
    *,
    num_tokens: int = 5,
    width: int = WIDTH,
    work: str = "f" * 16,
) -> None:
    """Commit a shard of images whose tokens depend on their keys, and make a snapshot."""
    writer = ShardWriter(
        store=store, shard_id=shard_id, attempt=uuid.uuid4().hex, columns=(), metadata={}
    )
    with writer:
        for key in keys:
            generator = torch.Generator().manual_seed(sum(key.encode()))
            writer.write(
                RowToWrite(
                    key=key,
                    content_hash=key.encode().ljust(16)[:16],
                    packed=FP32.pack(torch.randn(num_tokens, width, generator=generator)),
                    positions=torch.randperm(16, generator=generator)[:num_tokens]
                    .numpy()
                    .astype(np.uint32),
                    sizes=np.arange(1, num_tokens + 1, dtype=np.float32),
                    grid=(1, 4, 4),
                    image_size=(28, 28),
                    columns={},
                )
            )
        writer.finish([])
    record = Commit(
        shard_id=shard_id,
        shard=ShardRef(url=f"{shard_id}.tar", size=1, etag="e"),
        work_fingerprint=work,
        attempt=writer.attempt,
        files=tuple(writer.files),
        num_read=len(keys),
        num_written=len(keys),
        rejected={},
        bytes_in=0,
        tokens_full=0,
        tokens_kept=0,
        bytes_tokens=0,
        seconds=0.0,
        committed_at=time.time(),
    )
    try_commit(store, record)
    build_snapshot(store)
