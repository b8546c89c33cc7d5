"""Train the tower: every patch names its glyph, colour, shape, pattern and place.

The heads read `hidden_states[-2]`, what a LLaVA hands to its language model; the class token
of the last layer names what is in the image, so that its attention has something to look for.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from pictures import read_pixels
from steps import Plan, run_steps
from targets import CONTENTS, HEADS
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import CLIPVisionModel

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's

_EASY = {"row": 0.1, "column": 0.1}  # weights of the heads that are learnt at once
_EMPTY_WEIGHT = 0.2  # of patches that a head has nothing to say of: most of them


class Heads(nn.Module):
    """One linear layer over the patches for all heads, one over the class token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.patches = nn.Linear(width, sum(HEADS.values()))
        self.image = nn.Linear(width, CONTENTS)


def load_pictures(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Return pixels (M, 3, E, E) uint8, and what `load_targets` gives."""
    pixels = [
        np.stack([picture for picture, _ in read_pixels(shard)])
        for shard in sorted(folder.glob("*.tar"))
    ]
    pixels_MEE3 = torch.from_numpy(np.concatenate(pixels))
    return pixels_MEE3.permute(0, 3, 1, 2), *load_targets(folder)


def load_targets(folder: Path) -> tuple[Tensor, Tensor]:
    """Return patch targets (M, P, H) uint8 and image targets (M, C), in the order of the keys."""
    patches, images = [], []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as targets:
            patches.append(targets["patches"])
            images.append(targets["images"])
    return torch.from_numpy(np.concatenate(patches)), torch.from_numpy(np.concatenate(images))


def train_tower(
    tower: CLIPVisionModel,
    heads: Heads,
    pictures: tuple[Tensor, Tensor, Tensor],
    *,
    plan: Plan,
    state_path: Path,
) -> Iterator[str]:
    """Train both; yield lines of a log. See `run_steps`."""

    def loss_of(_: int, chosen: Tensor) -> Tensor:
        return _loss(tower, heads, *(part[chosen] for part in pictures))

    yield from run_steps(
        [tower, heads], plan, num_images=len(pictures[0]), loss_of=loss_of, state_path=state_path
    )


def measure_heads(
    tower: CLIPVisionModel, heads: Heads, pictures: tuple[Tensor, Tensor, Tensor]
) -> dict[str, float]:
    """Return how many of the patches that a head has something to say of it names right."""
    right = dict.fromkeys(HEADS, 0)
    total = dict.fromkeys(HEADS, 0)
    pixels, patches, _ = pictures
    with torch.inference_mode():
        for part in torch.arange(len(pixels)).split(128):
            logits_BPX, _ = _forward(tower, heads, pixels[part])
            for place, (name, logits) in enumerate(_split(logits_BPX)):
                wanted_BP = patches[part, :, place]
                counted = wanted_BP > 0 if name not in _EASY else wanted_BP >= 0
                right[name] += int((logits.argmax(-1) == wanted_BP)[counted].sum())
                total[name] += int(counted.sum())
    return {name: right[name] / max(total[name], 1) for name in HEADS}


def patch_loss(logits_BPX: Tensor, patches_BPH: Tensor) -> Tensor:
    """Return the sum over heads of the mean cross entropy of a patch."""
    loss = logits_BPX.new_zeros(())
    for place, (name, logits) in enumerate(_split(logits_BPX)):
        wanted = patches_BPH[..., place].long().flatten()
        losses = F.cross_entropy(logits.flatten(0, 1), wanted, reduction="none")
        weights = torch.where(wanted > 0, 1.0, _EMPTY_WEIGHT)
        loss = loss + _EASY.get(name, 1.0) * (losses * weights).sum() / weights.sum()
    return loss


def _forward(tower: CLIPVisionModel, heads: Heads, pixels_B3EE: Tensor) -> tuple[Tensor, Tensor]:
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    values = (pixels_B3EE.float() / 255 - mean) / std
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = tower(pixel_values=values, output_hidden_states=True)
        logits_BPX = heads.patches(heads.norm(output.hidden_states[-2][:, 1:]))
        logits_BC = heads.image(output.pooler_output)
    return logits_BPX.float(), logits_BC.float()


def _split(logits_BPX: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield from zip(HEADS, logits_BPX.split(list(HEADS.values()), dim=-1), strict=True)


def _loss(
    tower: CLIPVisionModel, heads: Heads, pixels: Tensor, patches_BPH: Tensor, images_BC: Tensor
) -> Tensor:
    logits_BPX, logits_BC = _forward(tower, heads, pixels)
    loss_of_images = F.binary_cross_entropy_with_logits(logits_BC, images_BC.float())
    return loss_of_images + patch_loss(logits_BPX, patches_BPH)
