"""Carvers: one file per method; the file name is the carver's name."""

from pipeline.carvers._base import Carver
from pipeline.registry import Registry

__all__ = ["Carver", "build", "load", "names"]

_registry = Registry("carver", __name__, Carver)
names = _registry.names
load = _registry.load
build = _registry.build
