"""Precomputed, compressed visual context: encode a corpus once, keep what carries information.

>>> import pipeline
>>> cache = pipeline.open_cache("s3://bucket/cache", keep_tokens=64)   # doctest: +SKIP
>>> cache["some/key"].features                                         # doctest: +SKIP
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline import carvers, codecs, encoders
    from pipeline.carved_cache import CachedImage, CarvedCache, open_cache
    from pipeline.dataset import Batch, CarvedDataset, MixedDataset, on_device
    from pipeline.storage import DiskCache

__all__ = [
    "Batch",
    "CachedImage",
    "CarvedCache",
    "CarvedDataset",
    "DiskCache",
    "MixedDataset",
    "carvers",
    "codecs",
    "encoders",
    "on_device",
    "open_cache",
]

__version__ = "0.1.0"

_HOME = {
    "Batch": "pipeline.dataset",
    "CachedImage": "pipeline.carved_cache",
    "CarvedCache": "pipeline.carved_cache",
    "CarvedDataset": "pipeline.dataset",
    "DiskCache": "pipeline.storage",
    "MixedDataset": "pipeline.dataset",
    "on_device": "pipeline.dataset",
    "open_cache": "pipeline.carved_cache",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401  (any public name)
    """Import a public name when it is first used, so that `import pipeline` stays cheap."""
    if name in ("carvers", "codecs", "encoders"):
        return importlib.import_module(f"pipeline.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
