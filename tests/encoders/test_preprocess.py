"""Pixel for pixel against the image processors of transformers, of either backend."""

import json
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import is_torchvision_available

from pipeline import encoders
from pipeline.encoders._preprocess import read_preprocessor
from pipeline.errors import ConfigError, EncodeError
from tests.encoders.processor_cases import (
    CLIP,
    COFFEE,
    ELONGATED,
    GOLDEN,
    IMAGES,
    SETTINGS,
    SHAPES,
    digest,
    own_pixels,
    own_processor,
    own_values,
)
from tests.encoders.tiny_models import save_vit

BACKENDS = ["torchvision", "pillow"]
TORCHVISION = json.loads(GOLDEN.read_text())
needs_torchvision = pytest.mark.skipif(
    not is_torchvision_available(),
    reason="torchvision is not installed; what it makes is stored and tested all the same",
)


def prepared(settings, image, backend):
    pixels = read_preprocessor(settings, model="tiny", backend=backend).prepare(image)
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    return pixels


def ours(settings, image, backend):
    preprocessor = read_preprocessor(settings, model="tiny", backend=backend)
    pixels_BHWC = torch.from_numpy(preprocessor.prepare(image).copy())[None]
    return preprocessor.normalise(pixels_BHWC)[0]


@pytest.mark.parametrize("settings", SETTINGS)
def test_pixels_equal_those_of_the_torchvision_backend(settings):
    made = {name: digest(prepared(SETTINGS[settings], image, "torchvision"))
            for name, image in IMAGES.items()}  # fmt: skip

    assert {name: digest(image) for name, image in IMAGES.items()} == TORCHVISION["images"]
    assert made == TORCHVISION["pixels"][settings]


@needs_torchvision
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_pixels_and_values_equal_those_of_the_installed_torchvision_backend(settings):
    processor = own_processor(settings, "torchvision")
    for image in IMAGES.values():
        assert np.array_equal(
            prepared(settings, image, "torchvision"), own_pixels(processor, image)
        )
        torch.testing.assert_close(
            ours(settings, image, "torchvision"),
            own_values(processor, image).float(),
            atol=2e-6,
            rtol=1e-6,
        )


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("image", SHAPES.values(), ids=SHAPES)
def test_pixels_and_values_equal_those_of_the_pillow_backend(settings, image):
    processor = own_processor(settings, "pillow")

    assert np.array_equal(prepared(settings, image, "pillow"), own_pixels(processor, image))
    torch.testing.assert_close(
        ours(settings, image, "pillow"),
        own_values(processor, image).float(),
        atol=2e-6,
        rtol=1e-6,
    )


@pytest.mark.parametrize("name", ["clip", "clip, bilinear", "clip, lanczos", "llava, padded"])
@pytest.mark.parametrize("image", ELONGATED.values(), ids=ELONGATED)
def test_by_pillow_elongated_images_differ_by_one_level_at_most(name, image):
    settings = {**SETTINGS[name], "size": 112, "crop_size": 112}
    expected = own_pixels(own_processor(settings, "pillow"), image)

    pixels = prepared(settings, image, "pillow")

    levels = np.abs(pixels.astype(int) - expected)
    assert levels.max() <= 1
    assert (levels > 0).mean() < 0.002


@pytest.mark.parametrize("resample", [1, 2, 3], ids=["lanczos", "bilinear", "bicubic"])
def test_the_backends_differ_on_photographs_by_two_levels_at_most(resample):
    settings = {**CLIP, "resample": resample}
    largest = []
    for name in ("photo", "cat", "tall", "odd", "enlarged", "large"):
        made = [prepared(settings, IMAGES[name], backend).astype(int) for backend in BACKENDS]
        largest.append(np.abs(made[0] - made[1]).max())

    assert 1 <= max(largest) <= 2


@pytest.mark.parametrize("resample", [4, 5], ids=["box", "hamming"])
def test_a_filter_that_torch_lacks_is_refused_and_left_to_pillow(resample):
    settings = {**CLIP, "resample": resample}

    with pytest.raises(ConfigError, match=r"'resample' = .*'resize: pillow'"):
        read_preprocessor(settings, model="tiny", backend="torchvision")
    expected = own_pixels(own_processor(settings, "pillow"), COFFEE)
    assert np.array_equal(prepared(settings, COFFEE, "pillow"), expected)


def test_a_filter_that_is_not_used_is_no_obstacle():
    settings = {**CLIP, "resample": 5, "do_resize": False}

    assert prepared(settings, COFFEE, "torchvision").shape == (336, 336, 3)


def test_the_backend_is_a_part_of_what_an_encoder_is(tmp_path):
    save_vit(tmp_path, "clip")
    told = [encoders.build("vit", {"model": str(tmp_path)}).describe()]
    told += [
        encoders.build("vit", {"model": str(tmp_path), "resize": backend}).describe()
        for backend in BACKENDS
    ]

    assert told[0] == told[1]
    assert {**told[1], "resize": "pillow"} == told[2] != told[1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_encoder_takes_the_pixels_of_its_backend(tmp_path, backend):
    save_vit(tmp_path, "clip")
    encoder = encoders.build("vit", {"model": str(tmp_path), "resize": backend})
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())

    assert np.array_equal(encoder.preprocess(COFFEE), prepared(settings, COFFEE, backend))


def test_by_pillow_an_elongated_image_costs_no_more_than_its_part():
    # In full it would be resized to 336 x 6,720,000 pixels, which Pillow holds in 9 GB.
    image = np.tile(COFFEE[200:201], (1, 34, 1))[:, :20_000]

    assert prepared(CLIP, image, "pillow").shape == (336, 336, 3)


def test_by_torch_an_image_too_elongated_for_memory_is_refused_though_it_is_cropped():
    image = np.zeros((1, 20_000, 3), dtype=np.uint8)

    with pytest.raises(EncodeError, match=r"336 x 6720000 .*'resize: pillow'") as caught:
        prepared(CLIP, image, "torchvision")
    assert caught.value.reason == "too_elongated"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "settings",
    [SETTINGS["llava, padded"], {**CLIP, "do_center_crop": False}],
    ids=["padded to a square", "kept in proportion"],
)
def test_an_image_too_elongated_for_memory_is_refused_as_a_sample(settings, backend):
    image = np.zeros((1, 3_000_000, 3), dtype=np.uint8)

    with pytest.raises(EncodeError, match="1 x 3000000 pixels is too elongated") as caught:
        prepared(settings, image, backend)
    assert caught.value.reason == "too_elongated"


def test_a_whole_processor_file_of_transformers_is_understood():
    written = own_processor(SETTINGS["llava, padded"], "pillow").to_dict()

    preprocessor = read_preprocessor(written, model="tiny", backend="torchvision")

    assert preprocessor == read_preprocessor(
        SETTINGS["llava, padded"], model="tiny", backend="torchvision"
    )


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
        read_preprocessor({**CLIP, **change}, model="tiny", backend="torchvision")


@pytest.mark.parametrize("settings", ["clip", "llava, padded", "clip, crop beyond"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_read_only_image_is_taken_without_a_warning_and_not_written_to(settings, backend):
    image = COFFEE.copy()
    image.flags.writeable = False

    with warnings.catch_warnings(action="error"):
        prepared(SETTINGS[settings], image, backend)

    assert np.array_equal(image, COFFEE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_get_the_same_pixels(backend):
    preprocessor = read_preprocessor(CLIP, model="tiny", backend=backend)
    images = list(SHAPES.values()) * 4

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(preprocessor.prepare, images))

    assert all(
        np.array_equal(result, preprocessor.prepare(image))
        for result, image in zip(results, images, strict=True)
    )


@pytest.mark.parametrize("name", BACKENDS)
def test_a_preprocessed_image_keeps_nothing_larger_alive(name):
    pixels = prepared(CLIP, SHAPES["large"], name)

    assert memoryview(pixels if pixels.base is None else pixels.base).nbytes == 336 * 336 * 3


def clip_preprocessor(mean):
    return read_preprocessor({**CLIP, "image_mean": mean}, model="tiny", backend="torchvision")


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
