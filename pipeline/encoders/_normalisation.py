"""The arithmetic of an image processor, on the device: rescale and normalise."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Triple = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """Makes (pixel * scale - mean) / std of uint8 pixels, where they lie."""

    scale: float
    mean: Triple
    std: Triple

    @classmethod
    def of(cls, processor: Any) -> "Normalisation":  # noqa: ANN401  (transformers is untyped)
        """Return that of an image processor of transformers."""
        mean, std = triple(processor.image_mean), triple(processor.image_std)
        return cls(
            scale=float(processor.rescale_factor) if processor.do_rescale else 1.0,
            mean=mean if processor.do_normalize else (0.0, 0.0, 0.0),
            std=std if processor.do_normalize else (1.0, 1.0, 1.0),
        )

    def __call__(self, pixels_BHWC: Tensor) -> Tensor:
        """Return (B, 3, H, W) float32, equal to the processor's result but for the last bit."""
        planes_BCHW = pixels_BHWC.permute(0, 3, 1, 2).contiguous().to(torch.float32)
        mean_1C11 = _per_channel(self.mean, planes_BCHW.device)
        std_1C11 = _per_channel(self.std, planes_BCHW.device)
        return planes_BCHW.mul_(self.scale).sub_(mean_1C11).div_(std_1C11)


@functools.lru_cache(maxsize=64)
def _per_channel(values: Triple, device: torch.device) -> Tensor:
    """Return (1, 3, 1, 1) float32; kept, because a copy to a GPU makes the caller wait for it."""
    with torch.inference_mode(False):  # of use outside of it as well
        return torch.tensor(values, device=device).view(1, 3, 1, 1)


def triple(values: Any) -> Triple:  # noqa: ANN401
    """Return one number for each colour of a setting that may be one for all."""
    numbers = tuple(values) if isinstance(values, (tuple, list)) else (values,) * 3
    first, second, third = (float(number) for number in numbers)
    return first, second, third
