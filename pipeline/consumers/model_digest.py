"""A hash that tells the language models of two loaded models apart."""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor

_SAMPLED = 1024  # numbers from the middle of each tensor
_VISION = ("vision_tower.", "vision_model.")


def model_digest(model: Any) -> str:  # noqa: ANN401  (transformers is untyped)
    """Return 64 hex digits that change with what decides a decoder's keys and values.

    The language model's settings, and of every parameter behind the vision tower its name, shape
    and a sample of its numbers: a sample of each, so that training any one of them is seen. Where
    the model was loaded from, on which device it is, and in which type do not enter, but what
    casting to that type changed does.
    """
    config = model.config.get_text_config().to_dict()
    for name in ("_name_or_path", "dtype", "transformers_version"):
        config.pop(name, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.base_model.named_parameters()):
        if not name.startswith(_VISION):
            digest.update(f"\0{name}{list(parameter.shape)}".encode() + _sample(parameter))
    return digest.hexdigest()


def _sample(parameter: Tensor) -> bytes:
    flat = parameter.detach().reshape(-1)
    start = max(0, (len(flat) - _SAMPLED) // 2)
    return flat[start : start + _SAMPLED].to("cpu", torch.float32).numpy().tobytes()
