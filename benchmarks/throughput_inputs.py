"""What `throughput.py` works on: shards of photographs, a checkpoint, an encoder that is free."""

import io
import json
import random
import tarfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from pipeline import encoders
from pipeline.encoders import Encoder, Pixels
from pipeline.types import VisualTokens

IMAGE_SIZE = (640, 480)
JPEG_QUALITY = 90
_NOISE = 3.0  # standard deviation, of 255: what a camera leaves, which scaling has smoothed away


@dataclass(frozen=True, kw_only=True)
class TowerShape:
    """A CLIP tower, run without its last layer as LLaVA runs it."""

    width: int
    layers: int
    heads: int


TOWERS: Mapping[str, TowerShape] = {
    "small": TowerShape(width=192, layers=4, heads=3),
    "vit_l_336": TowerShape(width=1024, layers=24, heads=16),
}
"""All take 336 x 336 pixels in patches of 14: 576 tokens. `vit_l_336` is that of LLaVA-1.5."""


def write_shards(
    folder: Path, *, num_shards: int, images_per_shard: int, seed: int = 0
) -> list[Path]:
    """Write webdataset shards of JPEG photographs with captions, or find them there.

    Args:
        folder: made if it does not exist; shards of other sizes in it are replaced.
        num_shards: at least 1.
        images_per_shard: at least 1.
        seed: of everything random.
    """
    paths = [folder / f"shard-{shard:05d}.tar" for shard in range(num_shards)]
    made_with = {"num_shards": num_shards, "images_per_shard": images_per_shard, "seed": seed}
    record = folder.with_name(f"{folder.name}.json")
    if record.is_file() and json.loads(record.read_text()) == made_with:
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("shard-*.tar"):
        old.unlink()
    photos = _read_photos()
    noise = np.random.default_rng(seed).normal(0, _NOISE, (960, 1280, 3)).astype(np.float32)
    with ThreadPoolExecutor() as pool:
        for shard, path in enumerate(paths):
            names = [f"{shard:05d}-{place:05d}" for place in range(images_per_shard)]
            images = pool.map(
                lambda name: _photograph(photos, noise, random.Random(f"{seed}/{name}")), names
            )
            _write_tar(path, names, list(images))
    record.write_text(json.dumps(made_with))
    return paths


def _read_photos() -> list[Image.Image]:
    folder = resources.files("pipeline.demo") / "photos"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".jpg"))
    return [Image.open(io.BytesIO((folder / n).read_bytes())).convert("RGB") for n in names]


def _photograph(
    photos: Sequence[Image.Image], noise: NDArray[np.float32], rng: random.Random
) -> bytes:
    """Return a JPEG of a random crop of a photograph, scaled to `IMAGE_SIZE`, with noise."""
    photo = rng.choice(photos)
    width, height = IMAGE_SIZE
    scale = min(photo.width / width, photo.height / height) * rng.uniform(0.7, 1.0)
    left = rng.uniform(0, photo.width - scale * width)
    top = rng.uniform(0, photo.height - scale * height)
    box = (left, top, left + scale * width, top + scale * height)
    crop = photo.resize(IMAGE_SIZE, Image.Resampling.LANCZOS, box=box)
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    row, column = rng.randrange(noise.shape[0] - height), rng.randrange(noise.shape[1] - width)
    grainy = np.asarray(crop) + noise[row : row + height, column : column + width]
    sink = io.BytesIO()
    Image.fromarray(grainy.clip(0, 255).astype(np.uint8)).save(sink, "JPEG", quality=JPEG_QUALITY)
    return sink.getvalue()


def _write_tar(path: Path, names: Sequence[str], images: Sequence[bytes]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, image in zip(names, images, strict=True):
            for suffix, content in (("jpg", image), ("txt", f"photograph {name}".encode())):
                entry = tarfile.TarInfo(f"{name}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))


def write_checkpoint(folder: Path, name: str, *, seed: int = 0) -> Path:
    """Write a LLaVA checkpoint with a tower of random weights, or find it there."""
    shape = {**asdict(TOWERS[name]), "seed": seed}
    record = folder / "shape.json"
    if record.is_file() and json.loads(record.read_text()) == shape:
        return folder
    vision = CLIPVisionConfig(
        hidden_size=shape["width"],
        intermediate_size=4 * shape["width"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(  # there must be one; no benchmark runs it
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        _spread_weights(model)
    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(folder)
    edges = {"height": 336, "width": 336}
    CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=edges).save_pretrained(folder)
    record.write_text(json.dumps(shape))
    return folder


def _spread_weights(model: torch.nn.Module) -> None:
    """Draw matrices that keep the variance of what goes through them, so that tokens differ."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0, weight[0].numel() ** -0.5)


@dataclass(kw_only=True)
class NoOpEncoder(Encoder):
    """Does all that another encoder does before its tower runs, and then nothing.

    Attributes:
        model: checkpoint whose preprocessing and token shape are used.
        resize: that encoder's option.
    """

    model: str
    resize: str

    def __post_init__(self) -> None:
        options = {"model": self.model, "resize": self.resize}
        self._like: Encoder = encoders.build("llava", options)

    @property
    def yields(self) -> frozenset[str]:
        """No signals."""
        return frozenset()

    @property
    def width(self) -> int:
        """That of the other encoder."""
        return self._like.width

    def describe(self, signals: frozenset[str] = frozenset()) -> Mapping[str, Any]:
        """Return what the other encoder says, and that the tower is left out."""
        return {**self._like.describe(signals), "tower": "none"}

    def load(
        self,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        signals: frozenset[str] = frozenset(),
    ) -> None:
        """Draw the one image that stands for all."""
        assert not signals
        generator = torch.Generator().manual_seed(0)
        tokens_1ND = torch.randn(1, 576, self.width, generator=generator)
        self._tokens_1ND = tokens_1ND.to(device=device, dtype=dtype)

    def preprocess(self, image: Pixels) -> Pixels:
        """Return what the other encoder would take."""
        return self._like.preprocess(image)

    def encode_pixels(self, prepared: Sequence[Pixels]) -> list[VisualTokens]:
        """Return the same tokens for every image; takes pixel values too."""
        features_BND = self._tokens_1ND.expand(len(prepared), -1, -1)
        return [VisualTokens(features=features_BND, grid=(24, 24))]
