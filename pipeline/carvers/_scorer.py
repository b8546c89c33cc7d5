"""A trained judge of tokens: how well each token answers the others, by two projections.

Source: the scorer of VisionSelector as IDPruner uses it (arXiv 2602.13315);
github.com/Tencent/AngelSlim @ 67394ce. Written for safetensors files: the released loader runs
Python from the checkpoint's repository.

B images, N tokens, D feature width, H width of the projections.
"""

import functools
import hashlib
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline.errors import ConfigError

_WEIGHTS = {"q_proj.weight", "k_proj.weight"}  # (H, D)
_BIASES = {"q_proj.bias", "k_proj.bias"}  # (H,), both or neither


def scores(features_BND: Tensor, path: str) -> Tensor:
    """Return (B, N) float32: mean over j of q_i . k_j / sqrt(H), from the mean key in O(N D).

    Args:
        features_BND: tokens of the width that the scorer was trained on.
        path: safetensors file of `q_proj.weight` and `k_proj.weight`, both (H, D), and optionally
            `q_proj.bias` and `k_proj.bias`, (H,).

    Raises:
        ConfigError: there is no such file, or it holds something else or another width.
    """
    tensors = _load(path, features_BND.device)
    expected, width = tensors["q_proj.weight"].shape[1], features_BND.shape[2]
    if expected != width:
        raise ConfigError(
            f"scorer {path!r} takes features of width {expected}, the encoder gives {width}: "
            "use one trained for this model and stage"
        )
    # Image by image: products over a batch round by its size. Three vectors each, so no matter.
    return torch.stack([_image_scores(rows_ND.float(), tensors) for rows_ND in features_BND])


def _image_scores(rows_ND: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    query_HD, zero = tensors["q_proj.weight"], rows_ND.new_zeros(())
    key_H = tensors["k_proj.weight"] @ rows_ND.mean(dim=0) + tensors.get("k_proj.bias", zero)
    offset = (key_H * tensors.get("q_proj.bias", zero)).sum()
    return (rows_ND @ (key_H @ query_HD) + offset) / len(query_HD) ** 0.5


def digest(path: str) -> str:
    """Return the sha256 of a scorer's file, in hexadecimal.

    Raises:
        ConfigError: there is no such file.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as err:
        raise _unreadable(path, err) from err


@functools.lru_cache(maxsize=2)
def _load(path: str, device: torch.device) -> Mapping[str, Tensor]:
    try:
        tensors = {name: tensor.float() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as err:
        raise _unreadable(path, err) from err
    if tensors.keys() not in (_WEIGHTS, _WEIGHTS | _BIASES):
        raise ConfigError(
            f"scorer {path!r} holds {sorted(tensors)}, not {sorted(_WEIGHTS)} "
            f"and optionally {sorted(_BIASES)}"
        )
    shape = tensors["q_proj.weight"].shape
    wrong = {
        name: tuple(tensor.shape)
        for name, tensor in tensors.items()
        if tensor.shape != (shape if name in _WEIGHTS else shape[:1])
    }
    if wrong or len(shape) != 2:
        raise ConfigError(
            f"scorer {path!r}: shapes do not fit q_proj.weight {tuple(shape)}: {wrong}"
        )
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def _unreadable(path: str, err: Exception) -> ConfigError:
    return ConfigError(f"scorer {path!r} cannot be read as a safetensors file: {err}")
