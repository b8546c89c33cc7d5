"""Write the tables of docs/models.md: what each family is and what an image of it takes.

    python benchmarks/models.py

Stages and signals are asked of the encoders, on the tests' small models; bytes of the codecs and of
the format. Token counts and widths are arithmetic from the `config.json` of the models named.
"""

import sys
import tempfile
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
import transformers

from pipeline import codecs, encoders

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from pipeline.cache.row import BLOCK_TOKENS  # noqa: E402
from tests.encoders.tiny_families import FAMILIES, save_family  # noqa: E402
from tests.encoders.tiny_models import save_llava, save_vit  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
BUDGETS = (Fraction(1), Fraction(2, 9), Fraction(1, 9))
CODECS = ("fp16", "int8", "int4", "int2")


@dataclass(frozen=True, kw_only=True)
class Published:
    """A model, and how many tokens of which width an image of it has."""

    name: str
    encoder: str
    small: str  # of the tests
    tokens: int
    width: int
    image: str  # that these tokens are of
    rule: str


MODELS = (
    Published(
        name="LLaVA-1.5-7B, projected",
        encoder="llava",
        small="llava",
        tokens=(336 // 14) ** 2,
        width=4096,
        image="any",
        rule="24 x 24",
    ),
    Published(
        name="LLaVA-NeXT (v1.6-vicuna-7B)",
        encoder="llava_next",
        small="llava_next",
        tokens=5 * (336 // 14) ** 2,
        width=4096,
        image="672 x 672",
        rule="576 for the whole, 576 a tile, 1 to 4 tiles",
    ),
    Published(
        name="LLaVA-OneVision-Qwen2-7B",
        encoder="llava_onevision",
        small="llava_onevision",
        tokens=5 * (384 // 14) ** 2,
        width=3584,
        image="768 x 768",
        rule="729 for the whole, 729 a tile; above 9 x 1.21 tiles resampled",
    ),
    Published(
        name="Qwen2.5-VL-7B",
        encoder="qwen_vl",
        small="qwen2_5_vl",
        tokens=(1008 // 28) * (756 // 28),
        width=3584,
        image="1008 x 756",
        rule="1 for 28 x 28 pixels",
    ),
    Published(
        name="Qwen3-VL-8B, 3 planes",
        encoder="qwen_vl",
        small="qwen3_vl",
        tokens=(1024 // 32) * (768 // 32),
        width=4 * 4096,
        image="1024 x 768",
        rule="1 for 32 x 32 pixels",
    ),
    Published(
        name="InternVL3-8B",
        encoder="internvl",
        small="internvl",
        tokens=7 * (448 // 28) ** 2,
        width=3584,
        image="1344 x 896",
        rule="256 a tile, 1 to 12 tiles, and 256 for the whole",
    ),
    Published(
        name="SmolVLM2-2.2B",
        encoder="idefics3",
        small="smolvlm",
        tokens=13 * (384 // 14 // 3) ** 2,
        width=2048,
        image="1536 x 1152",
        rule="81 a tile of 384, and 81 for the whole",
    ),
    Published(
        name="Idefics3-8B-Llama3",
        encoder="idefics3",
        small="idefics3",
        tokens=13 * (364 // 14 // 2) ** 2,
        width=4096,
        image="1456 x 1092",
        rule="169 a tile of 364, and 169 for the whole",
    ),
    Published(
        name="Gemma 3 4B",
        encoder="gemma3",
        small="gemma3",
        tokens=(896 // 14 // 4) ** 2,
        width=2560,
        image="any",
        rule="16 x 16",
    ),
    Published(
        name="PaliGemma 2 3B, 224",
        encoder="paligemma",
        small="paligemma",
        tokens=(224 // 14) ** 2,
        width=2304,
        image="any",
        rule="16 x 16",
    ),
    Published(
        name="CLIP ViT-L/14-336",
        encoder="vit",
        small="vit clip",
        tokens=(336 // 14) ** 2,
        width=1024,
        image="any",
        rule="24 x 24",
    ),
    Published(
        name="DINOv2 large, 224",
        encoder="vit",
        small="vit dinov2",
        tokens=(224 // 14) ** 2,
        width=1024,
        image="any",
        rule="16 x 16",
    ),
    Published(
        name="DINOv3 ViT-L/16, 224",
        encoder="dinov3",
        small="dinov3",
        tokens=(224 // 16) ** 2,
        width=1024,
        image="any",
        rule="14 x 14",
    ),
    Published(
        name="SigLIP 2 so400m, fixed 384",
        encoder="vit",
        small="vit siglip",
        tokens=(384 // 14) ** 2,
        width=1152,
        image="any",
        rule="27 x 27",
    ),
    Published(
        name="SigLIP 2 so400m NaFlex",
        encoder="siglip2",
        small="siglip2",
        tokens=256,
        width=1152,
        image="any",
        rule="at most 256 patches of 16",
    ),
    Published(
        name="another with get_image_features (ViP-LLaVA-7B)",
        encoder="image_features",
        small="vipllava",
        tokens=(336 // 14) ** 2,
        width=4096,
        image="any",
        rule="24 x 24",
    ),
)


def save_small(path: Path, name: str) -> None:
    """Write the small model of a row."""
    if name == "llava":
        save_llava(path)
    elif name.startswith("vit "):
        save_vit(path, name.removeprefix("vit "))
    else:
        assert name in FAMILIES
        save_family(path, name)


def stored_bytes(codec: codecs.Codec, tokens: int, width: int) -> int:
    """Return the bytes of `tokens` and `aux` of one row; see docs/cache_format.md."""
    packed = codec.pack(torch.randn(2, width))
    blocks = -(-tokens // BLOCK_TOKENS)
    aux = 8 + tokens * (8 + codec.aux_bytes) + 4 * blocks + 4
    head = 4 + len(packed.head) if packed.head else 0
    return tokens * codec.token_bytes(width) + aux + head


def stages(encoder: encoders.Encoder) -> tuple[str, ...]:
    """Return the stages that an encoder takes as an option."""
    return typing.get_args(typing.get_type_hints(type(encoder))["stage"])


def families() -> Iterator[str]:
    """Yield the lines of the first table."""
    yield "| model | encoder | stages | tokens an image | signals |"
    yield "|---|---|---|---|---|"
    for model in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            save_small(Path(folder), model.small)
            encoder = encoders.build(model.encoder, {"model": folder})
            signals = ", ".join(f"`{name}`" for name in sorted(encoder.yields)) or "none"
            listed = ", ".join(f"`{stage}`" for stage in stages(encoder))
        yield f"| {model.name} | `{model.encoder}` | {listed} | {model.rule} | {signals} |"


def sizes() -> Iterator[str]:
    """Yield the lines of the second table."""
    heads = [f"{name} at {budget}" for name in CODECS for budget in BUDGETS]
    yield f"| model | image | tokens | width | {' | '.join(heads)} |"
    yield f"|---|---|{'---:|' * (2 + len(heads))}"
    for model in MODELS:
        taken = [
            stored_bytes(codecs.build(name), round(model.tokens * budget), model.width)
            for name in CODECS
            for budget in BUDGETS
        ]
        cells = [f"{number / 1e3:,.0f}" for number in taken]
        yield (
            f"| {model.name} | {model.image} | {model.tokens:,} | {model.width:,} | "
            f"{' | '.join(cells)} |"
        )


def main() -> None:
    """Write the page's tables."""
    page = PAGE.read_text(encoding="utf-8")
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    for name, lines in (("families", families()), ("sizes", sizes()), ("versions", [versions])):
        made = "\n".join(lines)
        before, begin, rest = page.partition(f"<!-- {name}: begin -->\n")
        _, end, after = rest.partition(f"<!-- {name}: end -->")
        assert begin and end, f"{PAGE} has no place for {name}"
        page = before + begin + made + "\n" + end + after
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
