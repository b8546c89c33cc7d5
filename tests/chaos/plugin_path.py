"""Let configs name the encoder of the storms, in this process and in the actors it starts."""

import importlib
from pathlib import Path

from ray import cloudpickle

from pipeline import encoders

PLUGINS = Path(__file__).parent / "plugins"


def install() -> None:
    """Add the folder of plug-ins; their classes travel to actors by value."""
    encoders.__path__.append(str(PLUGINS))
    cloudpickle.register_pickle_by_value(importlib.import_module("pipeline.encoders.paced"))
