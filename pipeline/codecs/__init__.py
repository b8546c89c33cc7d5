"""Codecs: one file per way to store a token; the file name is the codec's name."""

from pipeline.codecs._base import Codec
from pipeline.registry import Registry

__all__ = ["Codec", "build", "load", "names"]

_registry = Registry("codec", __name__, Codec)
names = _registry.names
load = _registry.load
build = _registry.build
