"""Datasets over caches for training and inference loops."""

from pipeline.dataset.batch import Batch, PackedRow, PaddedTokens, RaggedTokens
from pipeline.dataset.carved_dataset import CarvedDataset

__all__ = ["Batch", "CarvedDataset", "PackedRow", "PaddedTokens", "RaggedTokens"]
