"""An encoder without weights, and shards made in code."""

import io
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.config import JobConfig, parse_config
from pipeline.encoders import Encoder, Pixels
from pipeline.types import SIGNALS, VisualTokens


@dataclass(kw_only=True)
class FakeEncoder(Encoder):
    """Deterministic features and signals from pixels: every patch is projected at random."""

    side: int = 4  # patches along each edge
    dim: int = 64
    patch: int = 8
    salt: int = 0
    fail_above: int = 0  # raise torch.OutOfMemoryError for larger batches; 0: never

    @property
    def yields(self) -> frozenset[str]:
        return frozenset(SIGNALS)

    @property
    def width(self) -> int:
        return self.dim

    def describe(self, signals: frozenset[str] = frozenset()) -> Mapping[str, Any]:
        return {"model": "fake", "side": self.side, "dim": self.dim, "salt": self.salt}

    def load(
        self,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        signals: frozenset[str] = frozenset(),
    ) -> None:
        generator = torch.Generator().manual_seed(self.salt)
        shape = (self.patch * self.patch * 3, self.dim)
        self._weights = torch.randn(shape, generator=generator) / shape[0] ** 0.5
        self._signals = signals

    def preprocess(self, image: Pixels) -> Pixels:
        edge = self.side * self.patch
        return np.asarray(Image.fromarray(image).resize((edge, edge), Image.Resampling.BILINEAR))

    def encode_pixels(self, prepared: Sequence[Pixels]) -> list[VisualTokens]:
        if self.fail_above and len(prepared) > self.fail_above:
            raise torch.OutOfMemoryError(f"batch of {len(prepared)}")
        batch = torch.from_numpy(np.stack(prepared)).float() / 255
        size, side, patch = len(prepared), self.side, self.patch
        patches = batch.view(size, side, patch, side, patch, 3).transpose(2, 3)
        # One image at a time, so that a batch-mate cannot change the last bits.
        flat = patches.reshape(size, side * side, -1)
        features = torch.stack([image @ self._weights for image in flat])
        return [
            VisualTokens(
                features=features,
                grid=(side, side),
                signals={name: _fake_signal(name, features) for name in self._signals},
                image_indices=tuple(range(size)),
            )
        ]


def _fake_signal(name: str, features: torch.Tensor) -> torch.Tensor:
    """Return numbers >= 0, or any for vectors, in the shape that `SIGNALS` states."""
    norms = features.norm(dim=-1)
    shape = SIGNALS[name].partition(")")[0]
    if shape == "(B, N, D'":
        return features.clone()
    if shape == "(B, N, L, 3":
        return torch.stack([norms, norms / 2, norms * 2], dim=-1)[:, :, None].repeat(1, 1, 2, 1)
    assert shape == "(B, N", name
    return norms.clone()


def encoded_image(seed: int, *, size: tuple[int, int] = (48, 40), kind: str = "JPEG") -> bytes:
    """Return an encoded picture of coloured blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC).save(sink, kind)
    return sink.getvalue()


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    """Write members in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def write_corpus(folder: Path, *, num_shards: int = 2, num_images: int = 5) -> Path:
    """Write shards of good images with captions; keys tell shard and place."""
    for shard in range(num_shards):
        members = []
        for place in range(num_images):
            key = f"s{shard}-i{place:03d}"
            members.append((f"{key}.jpg", encoded_image(shard * 1000 + place)))
            members.append((f"{key}.txt", f"caption of {key}".encode()))
        write_tar(folder / f"shard-{shard:05d}.tar", members)
    return folder


def fake_config(corpus: Path | str, cache: Path | str, **sections: Any) -> JobConfig:
    """Return the config of a small run; `sections` replace whole sections."""
    values: dict[str, Any] = {
        "input": {"shards": str(corpus)},
        "output": {"url": str(cache)},
        "encoder": {"name": "llava"},
        "carver": {"name": "uniform_grid", "options": {"keep_tokens": 8}},
        "codec": {"name": "int8"},
        "runner": {"num_actors": 2, "gpus_per_actor": 0, "batch_size": 4},
    }
    return parse_config({**values, **sections})
