"""Tokens of the next batch on their way to a device while the last ones are in use."""

from collections.abc import Iterable, Iterator
from typing import Literal

import torch

from pipeline.dataset.batch import Batch, PaddedTokens, RaggedTokens

Form = Literal["packed", "padded"]


def on_device(
    batches: Iterable[Batch],
    device: torch.device | str,
    *,
    form: Form = "packed",
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[Batch, PaddedTokens | RaggedTokens]]:
    """Yield each batch with its tokens, unpacked on a device.

    On an accelerator the codes of the next batch are copied from pinned memory, and unpacked, on a
    stream of their own while the batch before is in use. Tokens may be used on the stream that was
    current when they were given. A batch whose rows were all damaged is passed over.

    Args:
        batches: from a dataset, or a DataLoader over one.
        device: where the tokens are wanted.
        form: `packed` for one sequence with `cu_seqlens`, `padded` for a rectangle.
        dtype: of the features.

    Raises:
        CacheFormatError: a batch is damaged.
        ValueError: no such form.
    """
    if form not in ("packed", "padded"):
        raise ValueError(f"form={form!r}: must be packed or padded")
    place = torch.device(device)

    def unpacked(batch: Batch) -> PaddedTokens | RaggedTokens:
        return getattr(batch, form)(device=place, dtype=dtype)

    whole = (batch for batch in batches if len(batch))
    if place.type == "cpu":
        for batch in whole:
            yield batch, unpacked(batch)
        return
    stream = torch.Stream(device=place)
    ahead: tuple[Batch, Batch, PaddedTokens | RaggedTokens, torch.Event] | None = None
    for batch in whole:
        pinned = batch.pin_memory()
        with stream:
            tokens = unpacked(pinned)
            done = stream.record_event()
        if ahead is not None:
            yield _given(ahead, place)
        ahead = (batch, pinned, tokens, done)
    if ahead is not None:
        yield _given(ahead, place)


def _given(
    ahead: tuple[Batch, Batch, PaddedTokens | RaggedTokens, torch.Event], device: torch.device
) -> tuple[Batch, PaddedTokens | RaggedTokens]:
    """Make the current stream wait for tokens, and tell their memory that it uses them."""
    batch, _, tokens, done = ahead
    current = torch.accelerator.current_stream(device)
    current.wait_event(done)
    for name in tokens.__slots__:
        value = getattr(tokens, name)
        if isinstance(value, torch.Tensor):
            value.record_stream(current)
    # The pinned copy is given up with `ahead`: it must have arrived by then.
    done.synchronize()
    return batch, tokens
