"""Datasets over caches for training and inference loops."""

from pipeline.dataset.batch import Batch, PackedRow, PaddedTokens, RaggedTokens
from pipeline.dataset.carved_dataset import CarvedDataset
from pipeline.dataset.device_batches import on_device
from pipeline.dataset.mixed_dataset import MixedDataset

__all__ = [
    "Batch",
    "CarvedDataset",
    "MixedDataset",
    "PackedRow",
    "PaddedTokens",
    "RaggedTokens",
    "on_device",
]
