"""DINOv3 vision transformers: a tower with rotary embedding, a class token and registers.

Source: O. Siméoni et al., DINOv3, arXiv 2508.10104; the model class is transformers'
    `DINOv3ViTModel`, of whose `last_hidden_state` this gives the patches.
Signals: of the tower's last layer, behind the rotary embedding.
Differs: the family's image processor resizes floats, so images are prepared as they are and resized
    on the device.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers.models.dinov3_vit.modeling_dinov3_vit import apply_rotary_pos_emb

from pipeline.encoders._attention_catch import AttentionCatch
from pipeline.encoders._base import Pixels
from pipeline.encoders._checkpoint_encoder import CheckpointEncoder, read_config
from pipeline.encoders._normalisation import Normalisation, triple
from pipeline.encoders._own_modules import build_model, fill_parts, part_sources
from pipeline.encoders._resize import TORCH_FILTERS
from pipeline.encoders._signals import mean_attention
from pipeline.encoders._view_encoder import LoadedViews
from pipeline.encoders._weights import Reads
from pipeline.errors import ConfigError
from pipeline.types import VisualTokens

_PARTS = ("embeddings", "model", "norm")
_PREFIXES: Mapping[str, Sequence[str]] = {
    # Checkpoints name the layers `layer`, a part of the tower or of `model`.
    part: (f"{part}.", f"dinov3_vit.{part}.", *(("", "dinov3_vit.") if part == "model" else ()))
    for part in _PARTS
}


@dataclass(kw_only=True)
class Dinov3(CheckpointEncoder[LoadedViews]):
    """Patch tokens of the last layer of a DINOv3 tower, behind its norm.

    Attributes:
        stage: there is no projector, so always `pre_projector`.
    """

    stage: Literal["pre_projector"] = "pre_projector"

    signals: ClassVar[frozenset[str]] = frozenset(
        {"cls_attention", "received_attention", "keys", "mean_keys", "attention_output"}
    )

    @property
    def yields(self) -> frozenset[str]:
        """Signals of the attention of the tower's last layer."""
        return self.signals

    @property
    def width(self) -> int:
        """Width of the tower."""
        return int(self._config.hidden_size)

    @cached_property
    def _config(self) -> Any:  # noqa: ANN401
        found = self._checkpoint.config
        if found.get("model_type") != "dinov3_vit":
            raise ConfigError(
                f"model {self.model!r} is a {found.get('model_type')!r}, not a 'dinov3_vit'"
            )
        return read_config(found, model=self.model)

    @cached_property
    def _resizing(self) -> "_Resizing":
        return _Resizing.read(self._checkpoint.processor, model=self.model)

    def _check_model(self) -> None:
        height, width = self._resizing.size
        edge = self._config.patch_size
        if height % edge or width % edge:
            raise ConfigError(
                f"model {self.model!r}: its image processor gives {height} x {width} pixels, which "
                f"are no whole patches of {edge}; correct preprocessor_config.json"
            )

    def _describe_options(self, signals: frozenset[str]) -> Mapping[str, Any]:
        return {"stage": self.stage}

    def _build(self) -> nn.Module:
        model: Any = build_model(lambda: transformers.DINOv3ViTModel(self._config))
        model.embeddings.mask_token = None  # used in pre-training only
        built: nn.Module = model
        return built

    def _reads(self, signals: frozenset[str]) -> Reads:
        sources = part_sources(self._build(), self._checkpoint, _PREFIXES)
        keys = frozenset(source.key for source in sources.values())
        return Reads(settings=self._checkpoint.config, keys=keys)

    def _load_model(
        self, *, device: torch.device, dtype: torch.dtype, signals: frozenset[str]
    ) -> LoadedViews:
        model: Any = self._build()
        fill_parts(model, self._checkpoint, _PREFIXES, device=device, dtype=dtype)
        first = 1 + self._config.num_register_tokens
        probe = _Probe(model, first, signals) if signals else None

        def run(pixels_BCHW: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            state_BTD = model(pixels_BCHW).last_hidden_state
            found = probe.take() if probe is not None else {}
            return state_BTD[:, first:].contiguous(), found

        return run

    def preprocess(self, image: Pixels) -> Pixels:
        """Return the image as it is: the family resizes floats; see `Encoder`."""
        return np.ascontiguousarray(image)

    def encode_pixels(self, prepared: Sequence[Pixels]) -> list[VisualTokens]:
        """Encode images of any size; see `Encoder`.

        Raises:
            NotLoadedError: before `load`.
        """
        loaded = self._weights
        with torch.inference_mode():
            pixels_BCHW = torch.cat([self._resizing(image, self._device) for image in prepared])
            features_BND, signals = loaded(pixels_BCHW.to(self._dtype))
        height, width = self._resizing.size
        edge = self._config.patch_size
        return [
            VisualTokens(
                features=features_BND,
                grid=(height // edge, width // edge),
                signals=signals,
                image_indices=tuple(range(len(prepared))),
            )
        ]


@dataclass(frozen=True, kw_only=True)
class _Resizing:
    """What the family's image processor does, on the device: rescale, resize, normalise."""

    size: tuple[int, int]
    mode: str
    scale: float
    normalise: Normalisation

    @classmethod
    def read(cls, settings: Mapping[str, Any], *, model: str) -> "_Resizing":
        kind = str(settings.get("image_processor_type")).removesuffix("Fast")
        size = settings.get("size") or {"height": 224, "width": 224}
        resample = int(settings.get("resample", 2))
        wrong = {
            name: settings[name]
            for name, expected in (
                ("do_resize", True),
                ("do_center_crop", False),
                ("do_rescale", True),
                ("do_normalize", True),
            )
            if settings.get(name) not in (None, expected)
        }
        if kind != "DINOv3ViTImageProcessor" or set(size) != {"height", "width"} or wrong:
            raise ConfigError(
                f"image processor of model {model!r} is {kind!r} with size {size} and {wrong}; "
                "known: DINOv3ViTImageProcessor that resizes to a height and a width, rescales and "
                "normalises"
            )
        if resample not in TORCH_FILTERS:
            raise ConfigError(f"image processor of model {model!r}: no filter {resample} in torch")
        scale = float(settings.get("rescale_factor", 1 / 255))
        return cls(
            size=(int(size["height"]), int(size["width"])),
            mode=TORCH_FILTERS[resample],
            scale=scale,
            normalise=Normalisation(
                scale=1.0,
                mean=triple(settings.get("image_mean", (0.485, 0.456, 0.406))),
                std=triple(settings.get("image_std", (0.229, 0.224, 0.225))),
            ),
        )

    def __call__(self, image: Pixels, device: torch.device) -> Tensor:
        """Return (1, 3, height, width) float32."""
        pixels_1CHW = torch.from_numpy(image).to(device).permute(2, 0, 1)[None].float() * self.scale
        resized_1CHW = nn.functional.interpolate(
            pixels_1CHW, self.size, mode=self.mode, antialias=self.mode != "nearest-exact"
        )
        return self.normalise(resized_1CHW.permute(0, 2, 3, 1))


class _Probe:
    """Signals of the last layer's attention, behind its rotary embedding."""

    def __init__(self, model: Any, first: int, signals: frozenset[str]) -> None:  # noqa: ANN401
        self._first, self._signals = first, signals
        self._attention = model.model.layer[-1].attention
        self._catch = AttentionCatch(self._attention)

    def take(self) -> dict[str, Tensor]:
        """Return the signals of the last run, and forget it."""
        hidden_BTD, (cos, sin), output_BTD = self._catch.take()
        attention, first = self._attention, self._first
        shape = (*hidden_BTD.shape[:2], attention.num_heads, attention.head_dim)
        queries_BHTd, keys_BHTd = (
            linear(hidden_BTD).view(shape).transpose(1, 2)
            for linear in (attention.q_proj, attention.k_proj)
        )
        rotate: Any = apply_rotary_pos_emb
        queries_BHTd, keys_BHTd = rotate(queries_BHTd, keys_BHTd, cos, sin)
        keys_BNHd = keys_BHTd[:, :, first:].transpose(1, 2).float()
        made: Mapping[str, Callable[[], Tensor]] = {
            "cls_attention": lambda: mean_attention(queries_BHTd[:, :, :1], keys_BHTd, first),
            "received_attention": lambda: mean_attention(
                queries_BHTd[:, :, first:], keys_BHTd, first
            ),
            "keys": lambda: keys_BNHd.flatten(2),
            "mean_keys": lambda: keys_BNHd.mean(dim=2),
            "attention_output": lambda: output_BTD[:, first:].float(),
        }
        return {name: made[name]() for name in self._signals}
