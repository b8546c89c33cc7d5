"""Every family: cached tokens give what pixels give, and dropped ones are as if masked out."""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor

from pipeline import CarvedDataset, encoders, open_cache
from pipeline.cache.commit import claim_identity
from pipeline.carve_shard import ShardCarver
from pipeline.config import parse_config
from pipeline.consumers.arrangement import ROW_END, arrange
from pipeline.consumers.hf import prepare, weighted_generate
from pipeline.errors import ConfigError
from pipeline.job import Job, resolve_job
from pipeline.plan import make_plan
from pipeline.storage import open_store
from pipeline.types import TileLayout
from tests.encoders.tiny_families import FAMILIES, IMAGE_ID, save_family, upstream_inputs
from tests.encoders.tiny_models import photo
from tests.fakes import write_tar

IMAGES = [photo("coffee"), photo("chelsea")[:, :150], photo("coffee")[:90, 200:500]]
WORDS = ["<unk>", "<s>", "</s>", "<pad>", "what", "is", "in", "this", "picture", "a", "dog", "cats"]
TILES = {f"<row_{r + 1}_col_{c + 1}>": 30 + 4 * r + c for r in range(4) for c in range(4)}
QWEN = {"<|image_pad|>": 60, "<|vision_start|>": 58, "<|vision_end|>": 59}
SPECIAL: Mapping[str, Mapping[str, int]] = {
    "qwen2_5_vl": QWEN,
    "qwen3_vl": QWEN,
    "internvl": {"<IMG_CONTEXT>": 60, "<img>": 58, "</img>": 59},
    "gemma3": {"<image_soft_token>": 60, "<start_of_image>": 58, "<end_of_image>": 59, "\n": 57},
    "idefics3": {
        **{"<image>": 60, "<fake_token_around_image>": 58, "<global-img>": 59, "\n": 57},
        "<end_of_utterance>": 56,
        **TILES,
    },
    "paligemma": {"<image>": 60, "\n": 57},
}
NAMED = {
    "gemma3": {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    },
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
    },
}
WRITTEN = {
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "qwen3_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "internvl": "<IMG_CONTEXT>",
    "gemma3": "<start_of_image>",
}


@dataclass
class Row:
    """What a cache gives of an image."""

    features: Tensor
    positions: Tensor
    sizes: Tensor
    grid: tuple[int, int, int]
    tiles: TileLayout | None

    def keep(self, positions: Tensor, sizes: Tensor | None = None) -> "Row":
        chosen = torch.ones(len(positions)) if sizes is None else sizes
        return Row(self.features[positions], positions, chosen, self.grid, self.tiles)


@dataclass
class Family:
    name: str
    path: Path
    model: Any
    tokenizer: Any
    rows: list[Row] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return self.model.config.model_type

    def prompt(self, *parts: str) -> str:
        """Return texts with an image between each two of them."""
        return f" {WRITTEN.get(self.kind, '<image>')} ".join(parts)

    def prepared(self, prompts: list[str], rows: list[Any], **options: Any) -> dict[str, Any]:
        return prepare(self.model, self.tokenizer, prompts, rows, **options)


def tokenizer_of(kind: str) -> transformers.PreTrainedTokenizerFast:
    kind = {"smolvlm": "idefics3"}.get(kind, kind)
    special = SPECIAL.get(kind, {"<image>": IMAGE_ID})
    words = {**{word: i for i, word in enumerate(WORDS)}, **special}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    made.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        extra_special_tokens=NAMED.get(kind, {}),
    )


SERVED = [
    name
    for name in FAMILIES
    if name not in ("internvl_normed", "vipllava", "aya_vision", "siglip2", "dinov3")
]


@pytest.fixture(scope="module", params=SERVED)
def family(request, tmp_path_factory) -> Family:
    path = tmp_path_factory.mktemp(request.param)
    model = save_family(path, request.param)
    found = Family(request.param, path, model, tokenizer_of(model.config.model_type))
    encoder = encoders.build(
        FAMILIES[request.param].encoder, {"model": str(path), "resize": "pillow"}
    )
    encoder.load()
    for image in IMAGES:
        (group,) = encoder.encode([image])
        count = group.features.shape[1]
        found.rows.append(
            Row(
                features=group.features[0],
                positions=torch.arange(count),
                sizes=torch.ones(count),
                grid=(group.num_views, *group.grid),
                tiles=group.tiles,
            )
        )
    return found


def from_pixels(family: Family, ids: Tensor, numbers: list[int]) -> dict[str, Any]:
    """Return inputs of one prompt by the model's own way from pixels."""
    made = [upstream_inputs(family.path, family.name, IMAGES[number]) for number in numbers]
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for key in made[0]:
        parts = [own[key] for own in made]
        if family.kind in ("llava_next", "llava_onevision") and key == "pixel_values":
            inputs[key] = padded_views(parts)
        elif family.kind in ("idefics3", "smolvlm"):
            inputs[key] = padded_views(parts).flatten(0, 1)[None]
        else:
            inputs[key] = torch.cat(parts)
    if family.kind.startswith("qwen"):
        inputs["mm_token_type_ids"] = (ids == IMAGE_ID).int()
    if family.kind in ("gemma3", "paligemma"):
        inputs["token_type_ids"] = (ids == IMAGE_ID).long() * (family.kind == "gemma3")
    return inputs


def padded_views(parts: list[Tensor]) -> Tensor:
    most = max(part.shape[1] for part in parts)
    pads = [(0, 0) * (part.ndim - 2) + (0, most - part.shape[1]) for part in parts]
    return torch.cat(
        [torch.nn.functional.pad(part, pad) for part, pad in zip(parts, pads, strict=True)]
    )


def logits(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def said(model: Any, inputs: Mapping[str, Any]) -> list[list[int]]:
    ids = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    return ids[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("placement", ["packed", "original"])
def test_all_tokens_give_the_logits_and_the_text_of_pixels(family: Family, placement: str) -> None:
    for texts, numbers in ((("what is", "in this"), [0]), (("a", "dog", "cats"), [1, 2])):
        if len(numbers) > 1 and family.kind == "paligemma":
            texts = ("", "", "cats")
        rows = [family.rows[number] for number in numbers]

        inputs = family.prepared([family.prompt(*texts)], rows, placement=placement)

        pixels = from_pixels(family, inputs["input_ids"], numbers)
        expected = logits(family.model, pixels)
        if placement == "packed" and family.kind.startswith("qwen"):
            continue  # it is not told the grid: that must differ
        torch.testing.assert_close(logits(family.model, inputs), expected, atol=1e-4, rtol=0)
        assert said(family.model, inputs) == said(family.model, pixels)


def test_a_ragged_batch_gives_what_each_prompt_gives_alone(family: Family) -> None:
    first = family.prompt("what is", "in this picture")
    second = family.prompt("", "") if family.kind == "paligemma" else family.prompt("is", "")
    kept = [family.rows[0].keep(torch.tensor([0, 3])), family.rows[1]]

    together = family.prepared([first, second], kept, placement="original")
    alone = [
        family.prepared([prompt], [row], placement="original")
        for prompt, row in ((first, kept[0]), (second, kept[1]))
    ]

    found = logits(family.model, together)
    for row, (own, inputs) in enumerate(zip(found, alone, strict=True)):
        mask = together["attention_mask"][row].bool()
        expected = logits(family.model, inputs)[0]
        torch.testing.assert_close(own[mask], expected, atol=1e-4, rtol=0)
    assert said(family.model, together) == [said(family.model, inputs)[0] for inputs in alone]


def chosen(row: Row, seed: int) -> Tensor:
    """Return about half of the tokens, and of the first row of a canvas none."""
    generator = np.random.default_rng(seed)
    count = len(row.positions)
    picked = np.flatnonzero(generator.random(count) < 0.5)
    if row.tiles is not None and row.tiles.canvas is not None:
        start = count - int(np.prod(row.tiles.canvas))
        picked = picked[(picked < start) | (picked >= start + row.tiles.canvas[1])]
    return torch.from_numpy(picked)


def stays_of(kind: str, row: Row, kept: Tensor) -> list[bool]:
    """Return for each slot of an image whether it stays, found one by one."""
    sources = arrange(kind, row.grid, row.tiles).sources.tolist()
    there = set(kept.tolist())
    first = sources.index(ROW_END) if ROW_END in sources else 0
    ends = [i for i, source in enumerate(sources) if source == ROW_END]
    length = ends[1] - ends[0] if len(ends) > 1 else 0
    stays = []
    for slot, source in enumerate(sources):
        if source == ROW_END:
            line = sources[slot - length + 1 : slot] if length else sources[:first]
            stays.append(any(token in there for token in line))
        else:
            stays.append(source in there)
    return stays


def test_dropped_tokens_are_as_if_masked_out(family: Family) -> None:
    prompts = [family.prompt("what is", "in this picture")]
    for number, row in enumerate(family.rows):
        kept = chosen(row, number)
        inputs = family.prepared(prompts, [row.keep(kept)], placement="original")
        whole = family.prepared(prompts, [row], placement="original")
        stays = torch.ones_like(whole["input_ids"], dtype=torch.bool)
        stays[whole["input_ids"] == IMAGE_ID] = torch.tensor(stays_of(family.kind, row, kept))

        masked = logits(family.model, {**whole, "attention_mask": stays.long()})

        assert torch.equal(inputs["input_ids"], whole["input_ids"][stays][None])
        found = logits(family.model, inputs)
        torch.testing.assert_close(found, masked[stays][None], atol=1e-4, rtol=0)
        if family.kind != "gemma3":  # its images are of four tokens
            packed = family.prepared(prompts, [row.keep(kept)])
            assert (logits(family.model, packed) - found).abs().max() > 1e-3


def test_generation_goes_on_from_the_place_of_the_text(family: Family) -> None:
    """Token by token, each time from nothing, with places counted on by hand."""
    row = family.rows[0]
    kept = row.keep(chosen(row, 7))
    prompts = [family.prompt("what is", "in this picture")]
    inputs = family.prepared(prompts, [kept], placement="original")
    expected = []
    for _ in range(4):
        step = family.prepared(prompts, [kept], placement="original")
        for token in expected:
            step["input_ids"] = torch.cat([step["input_ids"], torch.tensor([[token]])], dim=1)
            step["attention_mask"] = torch.ones_like(step["input_ids"])
            places = step["position_ids"]
            step["position_ids"] = torch.cat([places, places[..., -1:] + 1], dim=-1)
            if "token_type_ids" in step:
                suffix = torch.tensor([[int(family.kind == "paligemma")]])
                step["token_type_ids"] = torch.cat([step["token_type_ids"], suffix], dim=1)
        scores = logits(family.model, step)[0, -1]
        scores[[IMAGE_ID, 2]] = -torch.inf
        expected.append(int(scores.argmax()))

    options = {"max_new_tokens": 4, "suppress_tokens": [IMAGE_ID, 2], "do_sample": False}
    ids = family.model.generate(**inputs, **options)

    assert ids[0, inputs["input_ids"].shape[1] :].tolist() == expected


@pytest.mark.parametrize("name", ["llava_next", "paligemma"])
def test_tokens_before_the_projector_are_projected_here(name: str, tmp_path: Path) -> None:
    family = Family(name, tmp_path, save_family(tmp_path, name), tokenizer_of(name))
    found = []
    for stage in ("pre_projector", "projected"):
        options = {"model": str(tmp_path), "resize": "pillow", "stage": stage}
        encoder = encoders.build(name, options)
        encoder.load()
        (group,) = encoder.encode(IMAGES[:1])
        grid, count = (group.num_views, *group.grid), group.features.shape[1]
        row = Row(group.features[0], torch.arange(count), torch.ones(count), grid, group.tiles)
        kept = row.keep(chosen(row, 1))
        text = family.prompt("", "what is this")
        inputs = family.prepared([text], [kept], stage=stage, placement="original")
        found.append(logits(family.model, inputs))

    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=0)


def test_sizes_weigh(family: Family) -> None:
    row = family.rows[0]
    positions = torch.arange(0, len(row.positions), 3)
    prompts = [family.prompt("what is", "in this picture")]
    ones = row.keep(positions)
    threes = row.keep(positions, torch.full((len(positions),), 3.0))
    plain = logits(family.model, family.prepared(prompts, [ones], placement="original"))
    same = logits(family.model, family.prepared(prompts, [ones], placement="weighted"))
    inputs = family.prepared(prompts, [threes], placement="weighted")
    found = logits(family.model, inputs)

    torch.testing.assert_close(same, plain, atol=1e-4, rtol=0)
    assert (found - plain)[0, -1].abs().max() > 1e-3
    first = int(found[0, -1].argmax())
    assert weighted_generate(family.model, inputs, max_new_tokens=1)[0, -1] == first


@pytest.mark.parametrize(
    ("name", "kind", "options"),
    [
        ("idefics3", "Idefics3Processor", {"image_seq_len": 4}),
        ("gemma3", "Gemma3Processor", {"image_seq_length": 4}),
        ("paligemma", "PaliGemmaProcessor", {}),
    ],
)
def test_prompts_are_those_of_the_familys_own_processor(
    name: str, kind: str, options: dict[str, int], tmp_path: Path
) -> None:
    model = save_family(tmp_path, name)
    tokenizer = tokenizer_of(name)
    images = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    images.image_seq_length = 16
    processor = getattr(transformers, kind)(images, tokenizer, **options)
    encoder = encoders.build(name, {"model": str(tmp_path), "resize": "pillow"})
    encoder.load()
    family = Family(name, tmp_path, model, tokenizer)

    for image in (IMAGES[0], IMAGES[1], IMAGES[0][:20, :20]):
        (group,) = encoder.encode([image])
        count = group.features.shape[1]
        grid = (group.num_views, *group.grid)
        row = Row(group.features[0], torch.arange(count), torch.ones(count), grid, group.tiles)
        text = family.prompt("", "what is this") if name == "paligemma" else family.prompt("a", "b")
        expected = processor(images=[image], text=[text])["input_ids"]
        found = prepare(model, tokenizer, [text], [row])["input_ids"]
        assert found.tolist() == np.array(expected).tolist()


def test_an_image_of_another_model_is_refused(family: Family) -> None:
    row = family.rows[0]
    wrong = TileLayout(rows=1, columns=1, unpadded=(0, 1, 0, 1)) if row.tiles is None else None
    other = Row(row.features, row.positions, row.sizes, row.grid, wrong)
    if wrong is None and family.kind in ("internvl", "idefics3", "smolvlm"):
        pytest.skip("an image may be too small for tiles")

    with pytest.raises(ConfigError, match="in tiles"):
        family.prepared([family.prompt("a", "b")], [other])


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "idefics3", "qwen3_vl"])
def test_what_was_carved_and_stored_gives_what_pixels_give(name: str, tmp_path: Path) -> None:
    family = Family(name, tmp_path / "model", save_family(tmp_path / "model", name), None)
    family.tokenizer = tokenizer_of(family.kind)
    write_tar(tmp_path / "in" / "a.tar", [(f"{i}.png", as_png(im)) for i, im in enumerate(IMAGES)])
    options = {"model": str(family.path), "resize": "pillow"}
    values = {
        "input": {"shards": str(tmp_path / "in")},
        "output": {"url": str(tmp_path / "cache")},
        "encoder": {"name": FAMILIES[name].encoder, "options": options},
        "carver": {"name": "identity"},
        "codec": {"name": "fp32"},
    }
    carve_all(resolve_job(parse_config(values, where="test")))

    cache = open_cache(str(tmp_path / "cache"))
    rows = [cache[key] for key in sorted(cache.keys())]
    read = {r.key: r for r in CarvedDataset(cache).collate(list(CarvedDataset(cache))).images()}
    for number, row in enumerate(rows):
        assert read[row.key].tiles == row.tiles
        prompts = [family.prompt("what is", "in this picture")]
        inputs = family.prepared(prompts, [row], placement="original")
        expected = logits(family.model, from_pixels(family, inputs["input_ids"], [number]))
        torch.testing.assert_close(logits(family.model, inputs), expected, atol=1e-4, rtol=0)


def as_png(image: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, "PNG")
    return sink.getvalue()


def carve_all(job: Job) -> None:
    store = open_store(job.config.output.url)
    claim_identity(store, job.identity)
    carver = ShardCarver(job)
    carver.load()
    for shard in make_plan(job, store).todo:
        carver.carve(shard)
    carver.close()
