"""Parts of a model, built by transformers' own classes and filled from a checkpoint."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pipeline.encoders._weights import Checkpoint, Source, fill, locate

_patching = threading.Lock()


def build_model(make: Callable[[], nn.Module], *, without: Sequence[str] = ()) -> nn.Module:
    """Build a model without memory for its weights, and without some of its parts.

    Args:
        make: builds the whole model.
        without: names of the children that are not wanted.
    """
    with _weightless():
        model = make()
    for name in without:
        setattr(model, name, nn.Identity())
    return model.eval()


def part_sources(
    model: nn.Module, checkpoint: Checkpoint, prefixes: Mapping[str, Sequence[str]]
) -> dict[str, Source]:
    """Find the stored tensor of each parameter of a model.

    Args:
        model: its children are looked for one by one.
        checkpoint: to look in.
        prefixes: by child, what may stand before its keys.

    Raises:
        ConfigError: one is missing.
    """
    sources: dict[str, Source] = {}
    for name, part in model.named_children():
        names = [key for key, _ in part.named_parameters()]
        if not names:
            continue
        found = locate(checkpoint, names, prefixes=prefixes[name])
        sources |= {f"{name}.{key}": source for key, source in found.items()}
    return sources


def fill_parts(
    model: nn.Module,
    checkpoint: Checkpoint,
    prefixes: Mapping[str, Sequence[str]],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Give a model its weights, one tensor at a time; see `fill` and `part_sources`."""
    fill(model, checkpoint, part_sources(model, checkpoint, prefixes), device=device, dtype=dtype)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            module.register_buffer(name, buffer.to(device), persistent=False)


@contextmanager
def _weightless() -> Iterator[None]:
    """Move each parameter that this thread makes to the meta device at once; buffers stay.

    On the meta device as a whole, buffers that a model computes when it is built, and that no
    checkpoint holds, would be lost.
    """
    thread, register = threading.get_ident(), nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: Any) -> None:  # noqa: ANN401
        if threading.get_ident() == thread and parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    with _patching:
        nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]
