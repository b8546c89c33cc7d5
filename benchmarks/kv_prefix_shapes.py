"""Language models of known shapes: what their stored keys and values take, and how long they do.

No weights are needed: the bytes of every codec depend on shapes alone, and so does the time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

from pipeline import codecs
from pipeline.consumers.hf import prepare
from pipeline.consumers.kv_packing import pack_prefix, unpack_prefixes
from pipeline.consumers.kv_prefix import make_prefix, prepare_prefixed, text_states

CODECS = ("fp16", "int8", "int4", "int2", "mixed", "gear")
DEVICES = {"1 TFLOP/s": 1e12, "100 TFLOP/s": 1e14, "400 TFLOP/s": 4e14}
"""Sustained rates of a prefill, assumed: a server's CPU, a small and a large GPU in 16 bits."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A language model, as its published config.json has it."""

    name: str
    layers: int
    width: int
    heads: int
    key_heads: int
    head_width: int
    inner: int  # width of the feed-forward part
    tokens: tuple[int, ...]  # per image: all, and budgets
    timed_tokens: int = 0  # 0: not timed

    @property
    def key_width(self) -> int:
        """Numbers of a key, all heads."""
        return self.key_heads * self.head_width

    @property
    def parameters(self) -> int:
        """Of the layers: what a token is multiplied with."""
        query = 2 * self.width * self.heads * self.head_width
        return self.layers * (query + 2 * self.width * (self.key_width + 1.5 * self.inner))

    def forms(self, names: Sequence[str]) -> Mapping[str, Callable[[], None]]:
        """Return what gives a first token, by what it starts from; bytes lie in memory."""
        model, tokenizer = self._build(), _Words()
        image = torch.randn(self.timed_tokens, self.width, generator=_seeded())
        stored = codecs.build("int8", {}).pack(image)
        question = "q" * 16

        def first(inputs: dict[str, Any]) -> None:
            with torch.inference_mode():
                model.generate(**inputs, max_new_tokens=1, do_sample=False)

        def from_tokens() -> None:
            features = codecs.build("int8", {}).unpack([stored])
            first(prepare(model, tokenizer, ["i" + question], [features]))

        prefix = make_prefix(model, tokenizer, "i", image)
        text = text_states(model, prefix.prompt)
        packed = {name: pack_prefix(prefix, codecs.build(name, {})) for name in names}

        def from_prefix(name: str) -> None:
            found = unpack_prefixes(
                [packed[name]],
                codecs.build(name, {}),
                prompt=prefix.prompt,
                placement="packed",
                text=text,
            )
            first(prepare_prefixed(model, tokenizer, found, [question]))

        forms: dict[str, Callable[[], None]] = {"tokens, int8": from_tokens}
        for name in names:
            forms[f"keys and values, {name}"] = lambda name=name: from_prefix(name)
        return forms

    def _build(self) -> Any:  # noqa: ANN401
        """Return a LLaVA with this decoder, a small vocabulary and hardly any tower."""
        text = Qwen2Config(
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            vocab_size=16,
            bos_token_id=None,
            eos_token_id=None,
        )
        vision = CLIPVisionConfig(
            hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1
        )
        torch.manual_seed(0)
        config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=_Words.IMAGE)
        return LlavaForConditionalGeneration(config).eval()


class _Words:
    """A tokenizer of one letter a token: `i` is the image, every other letter the same word."""

    IMAGE, WORD = 3, 4
    pad_token_id, eos_token_id = 0, 2

    def __call__(self, texts: Sequence[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[self.IMAGE if c == "i" else self.WORD for c in t] for t in texts]}


SHAPES = (
    Shape(
        name="LLaVA-1.5-7B",
        layers=32,
        width=4096,
        heads=32,
        key_heads=32,
        head_width=128,
        inner=11008,
        tokens=(576, 128, 64),
    ),
    Shape(
        name="Qwen2.5-VL-7B",
        layers=28,
        width=3584,
        heads=28,
        key_heads=4,
        head_width=128,
        inner=18944,
        tokens=(1024, 256, 128),
    ),
    Shape(
        name="LLaVA-OneVision-0.5B",
        layers=24,
        width=896,
        heads=14,
        key_heads=2,
        head_width=64,
        inner=4864,
        tokens=(729, 196, 64),
        timed_tokens=196,
    ),
)


def shape_tables() -> None:
    """Print bytes an image, and how fast a store must be for reading to be the faster way."""
    print(
        "MiB of one image's codes, scales and heads: those of one matrix of the shape, packed,\n"
        "times their number. Tokens are projected ones, as the language model takes them.\n"
    )
    print(
        f"| model | tokens | tokens, int8 | {' | '.join(f'KV {c}' for c in CODECS)} | int4 / int8 |"
    )
    print("|---|--:|--:|" + "--:|" * (len(CODECS) + 1))
    for shape in SHAPES:
        for count in shape.tokens:
            embedded = packed_bytes("int8", count, shape.width)
            sizes = {c: kv_bytes(shape, c, count) for c in CODECS}
            cells = " | ".join(f"{size / 2**20:.2f}" for size in sizes.values())
            print(
                f"| {shape.name} | {count} | {embedded / 2**20:.2f} | {cells} | "
                f"{sizes['int4'] / embedded:.1f} |"
            )
    print(
        "\nReading keys and values in int4 in place of tokens in int8 saves the prefill of the\n"
        "image (2 operations a parameter of the layers and token; attention not counted) and\n"
        "costs the difference in bytes. It is the faster way where bytes come, unpacked, at more\n"
        "than this many GB/s, for a device that sustains the rate named:\n"
    )
    print(f"| model | tokens | prefill, TFLOP | {' | '.join(DEVICES)} |")
    print("|---|--:|--:|" + "--:|" * len(DEVICES))
    for shape in SHAPES:
        for count in shape.tokens:
            operations = 2 * shape.parameters * count
            more = kv_bytes(shape, "int4", count) - packed_bytes("int8", count, shape.width)
            rates = [more / (operations / rate) / 1e9 for rate in DEVICES.values()]
            print(
                f"| {shape.name} | {count} | {operations / 1e12:.2f} | "
                f"{' | '.join(f'{rate:.2g}' for rate in rates)} |"
            )


def kv_bytes(shape: Shape, codec: str, count: int) -> int:
    """Return the bytes of all layers' keys and values of some tokens."""
    return 2 * shape.layers * packed_bytes(codec, count, shape.key_width)


@cache
def packed_bytes(codec: str, count: int, width: int) -> int:
    """Return the bytes of one packed (count, width) matrix."""
    rows: Tensor = torch.randn(count, width, generator=_seeded())
    packed = codecs.build(codec, {}).pack(rows)
    return len(packed.tokens) + len(packed.aux) + len(packed.head)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)
