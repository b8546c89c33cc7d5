"""Train the tower: every patch names its glyph, colour, shape, pattern and place.

The heads read `hidden_states[-2]`, what a LLaVA hands to its language model; the class token
of the last layer names what is in the image, so that its attention has something to look for.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pictures import read_pixels
from targets import CONTENTS, HEADS
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import CLIPVisionModel

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's

_EASY = {"row": 0.1, "column": 0.1}  # weights of the heads that are learnt at once
_EMPTY_WEIGHT = 0.2  # of patches that a head has nothing to say of: most of them
_GRADIENT_NORM = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How long to train, and how fast."""

    num_steps: int
    batch_size: int
    learning_rate: float


class Heads(nn.Module):
    """One linear layer over the patches for all heads, one over the class token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.patches = nn.Linear(width, sum(HEADS.values()))
        self.image = nn.Linear(width, CONTENTS)


def load_pictures(folder: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Return pixels (M, 3, E, E) uint8, patch targets (M, P, H) uint8, image targets (M, C)."""
    pixels, patches, images = [], [], []
    for shard in sorted(folder.glob("*.tar")):
        pixels.append(np.stack([picture for picture, _ in read_pixels(shard)]))
        with np.load(shard.with_suffix(".npz")) as targets:
            patches.append(targets["patches"])
            images.append(targets["images"])
    pixels_MEE3 = torch.from_numpy(np.concatenate(pixels))
    return (
        pixels_MEE3.permute(0, 3, 1, 2),
        torch.from_numpy(np.concatenate(patches)),
        torch.from_numpy(np.concatenate(images)),
    )


def train_tower(
    tower: CLIPVisionModel,
    heads: Heads,
    pictures: tuple[Tensor, Tensor, Tensor],
    *,
    plan: Plan,
    state_path: Path,
) -> Iterator[str]:
    """Train both, with all random choices drawn from the step's number; yield lines of a log.

    Interrupted, it goes on from the last state written.
    """
    parameters = [*tower.parameters(), *heads.parameters()]
    optimizer, scheduler = make_optimizer(parameters, plan)
    first = load_state(state_path, tower, heads, optimizer, scheduler)
    started, losses = time.monotonic(), []
    for step in range(first, plan.num_steps):
        chosen = choose(len(pictures[0]), plan.batch_size, step)
        loss = _loss(tower, heads, *(part[chosen] for part in pictures))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, _GRADIENT_NORM)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == plan.num_steps:
            seconds = (time.monotonic() - started) / (step + 1 - first)
            yield f"step {step + 1}: loss {np.mean(losses[-50:]):.4f}, {seconds:.2f} s a step"
            save_state(state_path, step + 1, tower, heads, optimizer, scheduler)


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


def make_optimizer(
    parameters: list[nn.Parameter], plan: Plan
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Return AdamW, and its learning rate over the steps: a warm-up, then half a cosine."""
    warm_up = max(1, min(200, plan.num_steps // 10))

    def factor(step: int) -> float:
        if step < warm_up:
            return (step + 1) / warm_up
        share = (step - warm_up) / (plan.num_steps - warm_up)
        return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share))

    optimizer = torch.optim.AdamW(
        parameters, lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.05
    )
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def choose(num_images: int, batch_size: int, step: int) -> Tensor:
    """Return the images of a step: all of them once, in a new order, before any comes again."""
    per_epoch = num_images // batch_size
    generator = torch.Generator().manual_seed(step // per_epoch)
    order = torch.randperm(num_images, generator=generator)
    start = step % per_epoch * batch_size
    return order[start : start + batch_size]


def save_state(path: Path, step: int, *parts) -> None:  # noqa: ANN002
    """Write what `load_state` needs, whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    torch.save({"step": step, "parts": [part.state_dict() for part in parts]}, unfinished)
    unfinished.replace(path)


def load_state(path: Path, *parts) -> int:  # noqa: ANN002
    """Put the parts back to where they were; return the number of steps done."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    for part, values in zip(parts, state["parts"], strict=True):
        part.load_state_dict(values)
    return state["step"]


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
