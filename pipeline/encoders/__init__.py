"""Encoders: one file per model family; the file name is the encoder's name."""

from pipeline.encoders._base import Encoder, Pixels
from pipeline.registry import Registry

__all__ = ["Encoder", "Pixels", "build", "load", "names"]

_registry = Registry("encoder", __name__, Encoder)
names = _registry.names
load = _registry.load
build = _registry.build
