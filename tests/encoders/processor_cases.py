"""Settings and images on which preprocessing is compared with transformers' image processors.

`python -m tests.encoders.processor_cases` writes `tests/data/torchvision_pixels.json`, the digests
of the pixels that the torchvision backend makes of all of them. It needs a torchvision of the same
build as torch (`torch==2.13.0+cpu` does not go with the torchvision of PyPI), which is why the
digests are stored: the tests run wherever the package does.
"""

import hashlib
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from tests.encoders.tiny_models import photo

GOLDEN = Path(__file__).parent.parent / "data" / "torchvision_pixels.json"

COFFEE = photo("coffee")
_NOISE = np.random.default_rng(0).integers(0, 256, (411, 411, 3), dtype=np.uint8)
SHAPES = {
    "photo": COFFEE,
    "cat": photo("chelsea"),
    "tall": COFFEE[:, 100:300],
    "odd": COFFEE[:333, :257],
    "square": COFFEE[:336, :336],
    "tiny": COFFEE[200:203, 300:302],
    "pixel": COFFEE[200:201, 300:301],
    "enlarged": COFFEE[150:250, 200:290],
    "large": np.tile(COFFEE, (2, 2, 1)),
    "noise": _NOISE[:301],
    "small noise": _NOISE[:17, :23],
}
ELONGATED = {
    "1xN": COFFEE[200:201],
    "Nx1": COFFEE[:, 300:301],
    "thin": COFFEE[100:120, :],
    "tower": np.tile(COFFEE[:, 300:340], (4, 1, 1)),
}
IMAGES = {**SHAPES, **ELONGATED, "tall noise": _NOISE[:, :50]}

CLIP = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 336},
    "crop_size": {"height": 336, "width": 336},
}
SIGLIP = {"image_processor_type": "SiglipImageProcessor"}
SETTINGS: dict[str, dict[str, Any]] = {
    "clip": CLIP,
    "clip, as once written": {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "size": 336,
        "crop_size": 336,
        "do_convert_rgb": True,
        "resample": 3,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    },
    "clip, uneven crop": {**CLIP, "crop_size": {"height": 221, "width": 300}},
    "clip, crop beyond": {**CLIP, "crop_size": {"height": 401, "width": 338}},
    "clip, bilinear": {**CLIP, "resample": 2},
    "clip, lanczos": {**CLIP, "resample": 1},
    "clip, nearest": {**CLIP, "resample": 0},
    "clip, no resize": {**CLIP, "do_resize": False},
    "clip, raw values": {**CLIP, "do_normalize": False, "do_rescale": False},
    "llava": {**CLIP, "image_processor_type": "LlavaImageProcessorFast"},
    "llava, padded": {**CLIP, "image_processor_type": "LlavaImageProcessor", "do_pad": True},
    "siglip": {**SIGLIP, "size": {"height": 384, "width": 384}},
    "siglip, uneven": {**SIGLIP, "size": {"height": 224, "width": 320}},
    "bit": {**CLIP, "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 400}},
    "vit": {"image_processor_type": "ViTImageProcessor"},
}


def own_processor(settings: dict[str, Any], backend: str) -> Any:
    """Return transformers' image processor with these settings.

    Args:
        settings: content of a `preprocessor_config.json`.
        backend: `torchvision` or `pillow`.
    """
    name = settings.get("image_processor_type") or settings["feature_extractor_type"]
    kind = name.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast")
    own = {name: value for name, value in settings.items() if not name.endswith("_type")}
    processor = getattr(transformers, kind + ("Pil" if backend == "pillow" else ""))(**own)
    assert processor.backend == {"pillow": "pil"}.get(backend, backend)
    return processor


def own_values(processor: Any, image: NDArray[np.uint8], **options: Any) -> torch.Tensor:
    """Return the (3, H, W) pixel values of one image."""
    values = processor(image, input_data_format="channels_last", **options)["pixel_values"][0]
    return torch.as_tensor(values)


def own_pixels(processor: Any, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the (H, W, 3) uint8 pixels that a processor goes on to rescale and normalise."""
    values = own_values(processor, image, do_rescale=False, do_normalize=False)
    assert values.dtype == torch.uint8
    return np.ascontiguousarray(values.permute(1, 2, 0).numpy())


def digest(pixels: NDArray[np.uint8]) -> str:
    """Return shape and 16 hex digits of the SHA-256 of (H, W, 3) uint8 pixels."""
    content = hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()
    return f"{pixels.shape[0]}x{pixels.shape[1]} {content[:16]}"


def write_golden() -> None:
    """Store the digests of all images and of what the torchvision backend makes of them."""
    processors = {name: own_processor(s, "torchvision") for name, s in SETTINGS.items()}
    golden = {
        "made by": {
            **{name: version(name) for name in ("transformers", "torchvision", "torch", "pillow")},
            "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        },
        "images": {name: digest(image) for name, image in IMAGES.items()},
        "pixels": {
            name: {key: digest(own_pixels(processor, image)) for key, image in IMAGES.items()}
            for name, processor in processors.items()
        },
    }
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    write_golden()
