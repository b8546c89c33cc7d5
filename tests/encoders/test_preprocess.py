"""Pixel for pixel against the image processors of transformers."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.encoders._preprocess import read_preprocessor
from pipeline.errors import ConfigError, EncodeError
from tests.encoders.tiny_models import photo, save_processor, upstream_processor

COFFEE = photo("coffee")
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
}
ELONGATED = {
    "1xN": COFFEE[200:201],
    "Nx1": COFFEE[:, 300:301],
    "thin": COFFEE[100:120, :],
    "tower": np.tile(COFFEE[:, 300:340], (4, 1, 1)),
}
CLIP = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 336},
    "crop_size": {"height": 336, "width": 336},
}
SIGLIP = {"image_processor_type": "SiglipImageProcessor"}
SETTINGS = {
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


def ours(settings, image):
    preprocessor = read_preprocessor(settings, model="tiny", backend="pillow")
    prepared = preprocessor.prepare(image)
    assert prepared.dtype == np.uint8 and prepared.flags.c_contiguous
    return preprocessor.normalise(torch.from_numpy(prepared.copy())[None])[0]


def theirs(tmp_path, settings, image):
    save_processor(tmp_path, settings)
    processor = upstream_processor(tmp_path)
    pixels = processor(image, input_data_format="channels_last")["pixel_values"][0]
    return torch.as_tensor(pixels).float(), processor


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("image", SHAPES.values(), ids=SHAPES)
def test_pixels_equal_those_of_the_models_own_processor(tmp_path, settings, image):
    expected, _ = theirs(tmp_path, settings, image)

    pixels = ours(settings, image)

    assert pixels.shape == expected.shape
    torch.testing.assert_close(pixels, expected, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["clip", "clip, bilinear", "clip, lanczos", "llava, padded"])
@pytest.mark.parametrize("image", ELONGATED.values(), ids=ELONGATED)
def test_elongated_images_differ_by_one_level_at_most(tmp_path, name, image):
    settings = {**SETTINGS[name], "size": 112, "crop_size": 112, "do_normalize": False}
    expected, _ = theirs(tmp_path, settings, image)

    pixels = ours(settings, image)

    levels = ((pixels - expected) * 255).abs()
    assert levels.max() < 1.001
    assert (levels > 0.5).float().mean() < 0.002


def test_an_elongated_image_costs_no_more_than_its_part(tmp_path):
    # In full it would be resized to 336 x 6,720,000 pixels, which Pillow holds in 9 GB.
    image = np.tile(COFFEE[200:201], (1, 34, 1))[:, :20_000]

    assert ours(CLIP, image).shape == (3, 336, 336)


@pytest.mark.parametrize(
    "settings",
    [SETTINGS["llava, padded"], {**CLIP, "do_center_crop": False}],
    ids=["padded to a square", "kept in proportion"],
)
def test_an_image_too_elongated_for_memory_is_refused_as_a_sample(settings):
    image = np.zeros((1, 3_000_000, 3), dtype=np.uint8)

    with pytest.raises(EncodeError, match="1 x 3000000 pixels is too elongated") as caught:
        read_preprocessor(settings, model="tiny", backend="pillow").prepare(image)
    assert caught.value.reason == "too_elongated"


def test_a_whole_processor_file_of_transformers_is_understood(tmp_path):
    _, processor = theirs(tmp_path, SETTINGS["llava, padded"], COFFEE)
    written = processor.to_dict()

    preprocessor = read_preprocessor(written, model="tiny", backend="pillow")

    assert preprocessor == read_preprocessor(SETTINGS["llava, padded"], model="tiny", backend="pillow")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"image_processor_type": "PixtralImageProcessor"}, "'image_processor_type'"),
        ({"image_processor_type": None}, "'image_processor_type'"),
        ({"size": {"shortest_edge": 336, "longest_edge": 500}}, "'size'"),
        ({"size": {"max_height": 300, "max_width": 500}}, "'size'"),
        ({"do_pad": True}, "'do_pad'"),
        ({"resample": 9}, "resample"),
        ({"use_square_size": True}, "'use_square_size'"),
        ({"do_reduce_labels": True}, "'do_reduce_labels'"),
        ({"data_format": "channels_last"}, "'data_format'"),
        ({"pad_size": {"height": 1, "width": 1}}, "'pad_size'"),
        ({"auto_map": {"AutoImageProcessor": "x.Y"}}, "'auto_map'"),
        ({"crop_size": "large"}, "crop_size"),
    ],
)
def test_a_setting_that_is_not_supported_is_named(change, named):
    with pytest.raises(ConfigError, match=named):
        read_preprocessor({**CLIP, **change}, model="tiny", backend="pillow")


def test_the_input_is_not_written_to():
    image = COFFEE.copy()
    image.flags.writeable = False

    ours(SETTINGS["llava, padded"], image)

    assert np.array_equal(image, COFFEE)


def test_threads_get_the_same_pixels():
    preprocessor = read_preprocessor(CLIP, model="tiny", backend="pillow")
    images = list(SHAPES.values()) * 4

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(preprocessor.prepare, images))

    assert all(
        np.array_equal(result, preprocessor.prepare(image))
        for result, image in zip(results, images, strict=True)
    )


def clip_preprocessor(mean):
    return read_preprocessor({**CLIP, "image_mean": mean}, model="tiny", backend="pillow")


class Calls(TorchDispatchMode):
    """Notes which tensor operations run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_the_mean_is_brought_to_the_device_once_and_not_for_every_batch():
    preprocessor = clip_preprocessor(mean=[0.11, 0.12, 0.13])
    pixels_BHWC = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    with torch.inference_mode():
        first = preprocessor.normalise(pixels_BHWC)

    with Calls() as calls:
        second = preprocessor.normalise(pixels_BHWC)

    assert "lift_fresh" not in calls.names  # a tensor made of Python numbers
    assert "mul_" in calls.names
    assert torch.equal(first, second)


def test_a_preprocessor_that_has_worked_can_be_pickled_and_used_by_many_threads():
    preprocessor = clip_preprocessor(mean=[0.21, 0.22, 0.23])
    pixels_BHWC = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(preprocessor.normalise, [pixels_BHWC] * 16))

    copy = pickle.loads(pickle.dumps(preprocessor))

    assert copy == preprocessor
    assert all(torch.equal(copy.normalise(pixels_BHWC), result) for result in results)
