"""Qwen2.5-VL and Qwen3-VL: a tower of native resolution whose merger makes a token of four patches.

Source: S. Bai et al., Qwen2.5-VL, arXiv 2502.13923; Qwen3-VL, arXiv 2511.21631; the model classes
    are transformers' `Qwen2_5_VLModel` and `Qwen3VLModel`, whose `get_image_features` this equals.
    Signals: AngelSlim's pruners for Qwen2.5-VL (github.com/Tencent/AngelSlim, 67394ce).
Signals: of the tower's last layer, over the whole image, behind the rotary embedding; attention is
    summed over the patches of a token, keys and outputs are averaged.
Differs: DeepStack planes of Qwen3-VL, which its language model adds to its first layers, stand
    behind the features of a token, one after the other: so are they carved, merged and stored
    together, and so vLLM takes them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_window_index

from pipeline.encoders._attention_catch import AttentionCatch
from pipeline.encoders._base import Pixels
from pipeline.encoders._own_model_encoder import OwnModelEncoder
from pipeline.encoders._resize import RESIZERS
from pipeline.encoders._signals import mean_attention
from pipeline.encoders._view_encoder import LoadedViews
from pipeline.errors import EncodeError

_SUMMED = "received_attention"


@dataclass(kw_only=True)
class QwenVl(OwnModelEncoder):
    """Visual tokens of a Qwen2.5-VL or Qwen3-VL model, as its language model is fed them.

    Attributes:
        stage: always `projected`: the merger makes one token of several patches.
    """

    stage: Literal["projected"] = "projected"

    models: ClassVar[Mapping[str, str]] = {
        "qwen2_5_vl": "Qwen2_5_VLModel",
        "qwen3_vl": "Qwen3VLModel",
    }
    processors: ClassVar[tuple[str, ...]] = ("Qwen2VLImageProcessor",)
    prefixes: ClassVar[Mapping[str, Sequence[str]]] = {"visual": ("model.visual.", "visual.")}

    @property
    def width(self) -> int:
        """Width of the language model, and as much again for each DeepStack plane."""
        planes = getattr(self._config.vision_config, "deepstack_visual_indexes", [])
        return super().width * (1 + len(planes))

    def _view_grid(self, rows: int, columns: int) -> tuple[int, int]:
        vision = self._config.vision_config
        edge = vision.patch_size * vision.spatial_merge_size
        return rows // edge, columns // edge

    def _views(self, image: Pixels) -> tuple[list[Pixels], None]:
        own, size = self._processor.own, image.shape[:2]
        if own.do_resize:
            try:
                size = smart_resize(
                    *size,
                    factor=own.patch_size * own.merge_size,
                    min_pixels=own.size["shortest_edge"],
                    max_pixels=own.size["longest_edge"],
                )
            except ValueError as err:
                raise EncodeError(
                    f"image of {size[1]} x {size[0]} pixels: {err}", key="", reason="too_elongated"
                ) from err
        if size != image.shape[:2]:
            image = RESIZERS[self.resize](image, size, int(own.resample), None)
        return [np.ascontiguousarray(image)], None

    def _run(self, model: Any, signals: frozenset[str]) -> LoadedViews:  # noqa: ANN401
        vision = self._config.vision_config
        probe = _Probe(model.visual, signals) if signals else None

        def run(pixels_BCHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            count = len(pixels_BCHW)
            patches_PX, grid = _patchify(pixels_BCHW, vision)
            grids_B3 = torch.tensor([[1, *grid]] * count, device=pixels_BCHW.device)
            found = model.get_image_features(patches_PX, image_grid_thw=grids_B3)
            planes = [found.pooler_output, *getattr(found, "deepstack_features", [])]
            features_BND = torch.cat([torch.stack(list(plane)) for plane in planes], dim=-1)
            return features_BND, probe.take(grids_B3, vision) if probe is not None else {}

        return run


def _patchify(pixels_BCHW: Tensor, vision: Any) -> tuple[Tensor, tuple[int, int]]:  # noqa: ANN401
    """Return all patches, those of one token together, and rows and columns of them."""
    edge, unit = vision.patch_size, vision.spatial_merge_size
    count, channels, height, width = pixels_BCHW.shape
    rows, columns = height // edge, width // edge
    shape = (count, channels, rows // unit, unit, edge, columns // unit, unit, edge)
    patches = pixels_BCHW.reshape(shape).permute(0, 2, 5, 3, 6, 1, 4, 7)
    # A still image is a clip of equal frames.
    frames = patches[:, :, :, :, :, :, None].expand(
        *patches.shape[:6], vision.temporal_patch_size, edge, edge
    )
    return frames.reshape(count * rows * columns, -1), (rows, columns)


class _Probe:
    """Signals of the last layer's attention, behind its rotary embedding."""

    def __init__(self, visual: Any, signals: frozenset[str]) -> None:  # noqa: ANN401
        self._signals = signals
        self._attention: Any = visual.blocks[-1].attn
        self._catch = AttentionCatch(self._attention)

    def take(self, grids_B3: Tensor, vision: Any) -> dict[str, Tensor]:  # noqa: ANN401
        """Return the signals of the last run, and forget it."""
        hidden_PD, (cos, sin), output_PD = self._catch.take()
        count, num_heads = len(grids_B3), self._attention.num_heads
        joined = self._attention.qkv(hidden_PD).reshape(len(hidden_PD), 3, num_heads, -1)
        queries_PHd, keys_PHd = joined[:, 0], joined[:, 1]
        rotate: Any = apply_rotary_pos_emb_vision
        queries_PHd, keys_PHd = rotate(queries_PHd, keys_PHd, cos, sin)
        queries_BHPd, keys_BHPd = (
            values.reshape(count, -1, *values.shape[1:]).transpose(1, 2)
            for values in (queries_PHd, keys_PHd)
        )
        keys_BPHd = keys_BHPd.transpose(1, 2).float()
        made: Mapping[str, Callable[[], Tensor]] = {
            _SUMMED: lambda: mean_attention(queries_BHPd, keys_BHPd, 0),
            "keys": lambda: keys_BPHd.flatten(2),
            "mean_keys": lambda: keys_BPHd.mean(dim=2),
            "attention_output": lambda: output_PD.float().reshape(count, -1, output_PD.shape[-1]),
        }
        order = _token_order(grids_B3, vision)
        return {name: self._of_tokens(name, made[name](), order, vision) for name in self._signals}

    def _of_tokens(self, name: str, values: Tensor, order: Tensor, vision: Any) -> Tensor:  # noqa: ANN401
        unit = vision.spatial_merge_size**2
        grouped = values.reshape(len(values), -1, unit, *values.shape[2:])
        merged = grouped.sum(dim=2) if name == _SUMMED else grouped.mean(dim=2)
        return merged.flatten(0, 1)[order].reshape(merged.shape)


def _token_order(grids_B3: Tensor, vision: Any) -> Tensor:  # noqa: ANN401
    """Return where the token of each place in the images stands in the tower's order."""
    if not hasattr(vision, "window_size"):
        return torch.arange(int(grids_B3.prod(dim=1).sum()) // vision.spatial_merge_size**2)
    window_index, _ = get_vision_window_index(
        grids_B3,
        spatial_merge_size=vision.spatial_merge_size,
        window_size=vision.window_size,
        patch_size=vision.patch_size,
    )
    return window_index.argsort()
