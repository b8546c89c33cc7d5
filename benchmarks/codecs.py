"""Measure what each codec costs in bytes, error and time, and print a page in Markdown.

    python benchmarks/codecs.py > benchmarks/codecs.md

Features come from towers with random weights on the demo's photographs (no trained weights can be
had without a network), and from a synthetic set with the outlier channels that trained towers
have. Errors and bytes do not depend on the machine; times do, and are taken on one thread, all
codecs by turns.
"""

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hardware import processor
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel

from pipeline import codecs, encoders
from pipeline.codecs import Codec
from pipeline.demo.corpus import PHOTOS
from pipeline.demo.model import save_model
from pipeline.types import PackedTokens

Options = dict[str, Any]

CODECS: list[tuple[str, Options]] = [
    ("bf16", {}),
    ("fp16", {}),
    ("int8", {}),
    ("int8_channel", {}),
    ("mixed", {"high_bits": 8, "low_bits": 4}),
    ("int4", {}),
    ("int4_channel", {}),
    ("mixed", {}),
    ("int3", {}),
    ("int2", {}),
    ("gear", {"bits": 4}),
    ("gear", {"bits": 2}),
    ("gear", {"bits": 2, "rank": 0, "outlier_share": 0.0}),
]
GEAR = [
    {"bits": bits, "group": group, "rank": rank, "outlier_share": share}
    for bits in (2, 4)
    for group in (32, 64, 128, 1024)
    for rank in (0, 2, 4)
    for share in (0.0, 0.01, 0.02)
]
BEGIN = """# Codecs: bytes, errors, times

    python benchmarks/codecs.py > benchmarks/codecs.md

Bits a value count codes, scales and heads, not positions and checksums. The error is
||x' - x|| / ||x||, the mean over tokens. The sets, K tokens an image in random order:

- **tower**: a CLIP ViT-L/14 of 336 pixels with random weights, second to last layer, on the
  demo's 9 photographs; D = 1024. It has the shape of the real thing, not its outlier channels.
- **demo**: the tower of the demo's tiny LLaVA, random weights too, on the same; D = 128, 196
  tokens.
- **outliers**: 4 synthetic images, D = 1024: Gaussian features, six channels 10 times larger, and
  tokens whose sizes differ by a factor of about two (log-normal).

No set is of a trained tower: measure on your own features before you choose."""
END = """
## What follows

- With few bits the rotated codecs (`int4`, `int3`, `int2`) have a far smaller error than `gear` of
  as many bytes, on every set: groups, outliers and factors cost more than they bring. That is
  why `int3` and `int2` exist.
- A scale per channel (`int8_channel`, `int4_channel`) is better than rotation where channels
  differ and tokens are alike (tower), and worse where single channels stand out (outliers). It is
  packed and unpacked two to seven times faster.
- Whether 4 bits a value or fewer are enough for a task, an error of features does not tell."""


@dataclass(frozen=True)
class Measured:
    """What one codec made of one set."""

    bits: float  # a value, everything counted
    error: float  # relative, mean over tokens


def photographs() -> list[np.ndarray]:
    """Return the demo's photographs as (H, W, 3) uint8."""
    folder = resources.files("pipeline.demo") / "photos"
    images = []
    for name in PHOTOS:
        with (folder / f"{name}.jpg").open("rb") as file:
            images.append(np.asarray(Image.open(file).convert("RGB")))
    return images


def demo_features(images: list[np.ndarray]) -> list[Tensor]:
    """Return (196, 128) features of each image from the demo's model, before the projector."""
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), captions=PHOTOS.values())
        encoder = encoders.build("llava", {"model": folder, "stage": "pre_projector"})
        encoder.load()
        groups = encoder.encode_pixels([encoder.preprocess(image) for image in images])
    return [features for group in groups for features in group.features]


def tower_features(images: list[np.ndarray]) -> list[Tensor]:
    """Return (576, 1024) features of each image from a ViT-L/14 with random weights."""
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    model = CLIPVisionModel(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        for name, weight in model.named_parameters():
            if weight.ndim > 1 or "class_embedding" in name:
                # Noise that keeps the variance of what goes through it; norms and biases stay.
                fan_in = max(1, weight[0].numel())
                weight.copy_(torch.randn(weight.shape, generator=generator) / fan_in**0.5)
        found = []
        for image in images:
            edge = min(image.shape[:2])
            square = Image.fromarray(image).crop((0, 0, edge, edge)).resize((336, 336))
            pixels = torch.from_numpy(np.asarray(square) / 127.5 - 1).float().permute(2, 0, 1)
            states = model(pixel_values=pixels.unsqueeze(0), output_hidden_states=True)
            found.append(states.hidden_states[-2][0, 1:].clone())
    return found


def outlier_features() -> list[Tensor]:
    """Return 4 synthetic images of (576, 1024)."""
    generator = torch.Generator().manual_seed(0)
    found = []
    channels = torch.randperm(1024, generator=generator)[:6]
    for _ in range(4):
        rows = torch.randn(576, 1024, generator=generator)
        rows[:, channels] *= 10
        sizes = torch.randn(576, 1, generator=generator).mul(0.7).exp()
        found.append(rows * sizes)
    return found


def in_random_order(images: list[Tensor], keep: int) -> list[Tensor]:
    """Return `keep` tokens of each image."""
    generator = torch.Generator().manual_seed(0)
    return [rows[torch.randperm(len(rows), generator=generator)[:keep]] for rows in images]


def num_bytes(packed: PackedTokens) -> int:
    """Return the bytes a codec stores for an image."""
    return len(packed.tokens) + len(packed.aux) + len(packed.head)


def measure(codec: Codec, images: list[Tensor]) -> Measured:
    """Pack and unpack a set."""
    packed = [codec.pack(rows) for rows in images]
    rows = torch.cat(images)
    errors = (codec.unpack(packed) - rows).norm(dim=1) / rows.norm(dim=1)
    return Measured(bits=8 * sum(map(num_bytes, packed)) / rows.numel(), error=float(errors.mean()))


def speeds(images: list[Tensor], rounds: int) -> list[tuple[float, float]]:
    """Return GB/s of float32 features that each codec packs and unpacks: the best round."""
    built = [codecs.build(name, options) for name, options in CODECS]
    size = sum(rows.nbytes for rows in images) / 1e9
    best = np.full((len(built), 2), np.inf)
    for _ in range(rounds):
        for place, codec in enumerate(built):
            start = time.perf_counter()
            packed = [codec.pack(rows) for rows in images]
            middle = time.perf_counter()
            codec.unpack(packed)
            best[place] = np.minimum(best[place], (middle - start, time.perf_counter() - middle))
    return [(size / pack, size / unpack) for pack, unpack in best]


def label(name: str, options: Options) -> str:
    """Return a codec with its options, as the tables name it."""
    given = ", ".join(f"{key}={value}" for key, value in options.items())
    return f"`{name}`" + (f" {given}" if given else "")


def error_tables(sets: Mapping[str, list[Tensor]]) -> Iterator[str]:
    """Yield the lines of one table: bits and error of each codec on each set."""
    yield "| codec | " + " | ".join(f"{name}: bits | error" for name in sets) + " |"
    yield "|---|" + "--:|--:|" * len(sets)
    for name, options in CODECS:
        found = [measure(codecs.build(name, options), images) for images in sets.values()]
        cells = " | ".join(f"{one.bits:.2f} | {one.error:.4f}" for one in found)
        yield f"| {label(name, options)} | {cells} |"


def equal_bytes(sets: Mapping[str, list[Tensor]]) -> Iterator[str]:
    """Yield a table of rotated codecs beside the best of many gear options of no more bytes."""
    yield "| set | codec | bits | error | best `gear` of no more bytes | bits | error |"
    yield "|---|---|--:|--:|---|--:|--:|"
    for set_name, images in sets.items():
        gears = [(options, measure(codecs.build("gear", options), images)) for options in GEAR]
        for name in ("int4", "int3", "int2"):
            ours = measure(codecs.build(name), images)
            # 2 % more bytes are let pass: a gear of one group a token has two numbers, not one.
            within = [gear for gear in gears if gear[1].bits <= 1.02 * ours.bits]
            line = f"| {set_name} | `{name}` | {ours.bits:.2f} | {ours.error:.4f} | "
            if not within:
                yield line + "none | | |"
                continue
            options, theirs = min(within, key=lambda gear: gear[1].error)
            given = ", ".join(f"{key}={value}" for key, value in options.items())
            yield line + f"{given} | {theirs.bits:.2f} | {theirs.error:.4f} |"


def speed_table(images: list[Tensor], rounds: int) -> Iterator[str]:
    """Yield the lines of the table of times."""
    before = os.getloadavg()[0]
    found = speeds(images, rounds)
    yield (
        f"One thread, the best of {rounds} rounds over {len(images)} images of {len(images[0])} x "
        f"{images[0].shape[1]}, unpacked together. The machine was shared: load {before:.1f} "
        f"before, {os.getloadavg()[0]:.1f} after."
    )
    yield ""
    yield "| codec | pack GB/s | unpack GB/s |"
    yield "|---|--:|--:|"
    for (name, options), (pack, unpack) in zip(CODECS, found, strict=True):
        yield f"| {label(name, options)} | {pack:.2f} | {unpack:.2f} |"


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images = photographs()
    tower, demo, outliers = tower_features(images), demo_features(images), outlier_features()
    few = {
        name: in_random_order(features, 64)
        for name, features in (("tower", tower), ("demo", demo), ("outliers", outliers))
    }
    many = {
        name: in_random_order(features, 576)
        for name, features in (("tower", tower), ("outliers", outliers))
    }
    print(BEGIN)
    print(
        f"\nHardware: {processor()}, {os.cpu_count()} logical cores. torch {torch.__version__}, "
        f"Python {platform.python_version()}."
    )
    for title, lines in (
        ("K = 64", error_tables(few)),
        ("K = 576", error_tables(many)),
        ("Rotated codecs and gear at equal bytes, K = 576", equal_bytes(many)),
        ("The same, K = 64", equal_bytes(few)),
        ("GB/s of float32 features, K = 576", speed_table(many["outliers"], options.rounds)),
    ):
        print(f"\n## {title}\n")
        print("\n".join(lines))
    print(END)


if __name__ == "__main__":
    main()
