"""The steps of a training: which images, which learning rate, and going on after a stop."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How long to train, and how fast."""

    num_steps: int
    batch_size: int
    learning_rate: float
    gradient_norm: float = 1.0  # larger gradients are scaled down to it; inf for none
    log_every: int = 50  # steps; so often the state is written


def run_steps(
    modules: Sequence[nn.Module],
    plan: Plan,
    *,
    num_images: int,
    loss_of: Callable[[int, Tensor], Tensor],
    state_path: Path | None = None,
) -> Iterator[str]:
    """Train modules with AdamW; yield lines of a log.

    All random choices are drawn from the step's number: interrupted, it goes on from the last
    state written as if it had not been.

    Args:
        modules: whose parameters are trained.
        plan: how long.
        num_images: that there are to choose from.
        loss_of: takes the step's number and the indices of its images.
        state_path: of the state; None to write none.
    """
    parameters = [weight for module in modules for weight in module.parameters()]
    optimizer, scheduler = _make_optimizer(parameters, plan)
    parts = (*modules, optimizer, scheduler)
    first, before = (0, 0.0) if state_path is None else _load_state(state_path, parts)
    started, losses = time.monotonic(), []
    for step in range(first, plan.num_steps):
        loss = loss_of(step, _choose(num_images, plan.batch_size, step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, plan.gradient_norm)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        if (step + 1) % plan.log_every == 0 or step + 1 == plan.num_steps:
            seconds = time.monotonic() - started
            if state_path is not None:
                _save_state(state_path, step + 1, before + seconds, parts)
            recent = np.mean(losses[-plan.log_every :])
            each = seconds / (step + 1 - first)
            yield f"step {step + 1}: loss {recent:.4f}, {each:.2f} s a step"


def seconds_spent(state_path: Path) -> float:
    """Return how long the steps to a state took, over all starts."""
    return torch.load(state_path, weights_only=True)["seconds"]


def _make_optimizer(
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


def _choose(num_images: int, batch_size: int, step: int) -> Tensor:
    """Return the images of a step: all of them once, in a new order, before any comes again."""
    per_epoch = num_images // batch_size
    generator = torch.Generator().manual_seed(step // per_epoch)
    order = torch.randperm(num_images, generator=generator)
    start = step % per_epoch * batch_size
    return order[start : start + batch_size]


def _save_state(path: Path, step: int, seconds: float, parts) -> None:  # noqa: ANN001
    """Write what `_load_state` needs, whole or not at all."""
    unfinished = path.with_suffix(".unfinished")
    states = [part.state_dict() for part in parts]
    torch.save({"step": step, "seconds": seconds, "parts": states}, unfinished)
    unfinished.replace(path)


def _load_state(path: Path, parts) -> tuple[int, float]:  # noqa: ANN001
    """Put the parts back to where they were; return the steps done and their seconds."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    for part, values in zip(parts, state["parts"], strict=True):
        part.load_state_dict(values)
    return state["step"], state["seconds"]
