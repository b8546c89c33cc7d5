"""Every family against transformers itself: the same tokens, by the model's own way from pixels."""

import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import encoders
from pipeline.consumers.arrangement import ROW_END, arrange
from pipeline.errors import ConfigError, EncodeError
from tests.encoders.tiny_families import FAMILIES, save_family, upstream_features, upstream_inputs
from tests.encoders.tiny_models import CLIP_PROCESSOR, photo, save_processor

IMAGES = [
    photo("coffee"),
    photo("chelsea"),
    photo("coffee")[:90, 200:500],
    photo("chelsea")[:, :150],
    photo("coffee")[:40, :40],
]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    return request.param, path, save_family(path, request.param)


def build(name, path, **options):
    resize = {} if name == "dinov3" else {"resize": "pillow"}
    chosen = {"model": str(path), **resize, **options}
    return encoders.build(FAMILIES[name].encoder, chosen)


def encoded(encoder, images):
    """Return for each image its tokens and the group it came in."""
    found = {}
    for group in encoder.encode(images):
        for place, index in enumerate(group.image_indices):
            found[index] = (group, place)
    return [found[index] for index in range(len(images))]


def fed(model, features, group):
    """Return tokens in the order that the model is fed them, with what it puts between."""
    kind = model.config.model_type
    sources = arrange(kind, (group.num_views, *group.grid), group.tiles).sources
    rows = features[sources.clamp_min(0)].clone()
    if bool((sources == ROW_END).any()):
        rows[sources == ROW_END] = model.model.image_newline.detach()
    return rows


def test_tokens_of_a_mixed_batch_are_those_of_the_model(family):
    name, path, model = family
    encoder = build(name, path)
    encoder.load()

    for image, (group, place) in zip(IMAGES, encoded(encoder, IMAGES), strict=True):
        expected = upstream_features(model, path, name, image)
        got = fed(model, group.features[place], group)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_grids_views_and_tiles_fit_the_tokens(family):
    name, path, _ = family
    encoder = build(name, path)
    encoder.load()

    for group, _ in encoded(encoder, IMAGES):
        rows, columns = group.grid
        assert group.features.shape[1] == group.num_views * rows * columns
        assert group.features.shape[2] == encoder.width
        if group.tiles is not None and group.tiles.canvas is None:
            assert group.num_views == 1 + group.tiles.rows * group.tiles.columns
            _, bottom, _, right = group.tiles.unpadded
            assert bottom <= group.tiles.rows * rows
            assert right <= group.tiles.columns * columns


def test_an_image_is_the_same_alone_and_in_any_company(family):
    name, path, _ = family
    encoder = build(name, path)
    encoder.load(signals=encoder.yields)
    together = encoded(encoder, [*IMAGES, IMAGES[0]])

    for index, image in enumerate(IMAGES):
        ((alone, _),) = encoded(encoder, [image])
        group, place = together[index]
        torch.testing.assert_close(group.features[place], alone.features[0], atol=1e-5, rtol=1e-5)
        for signal, values in alone.signals.items():
            torch.testing.assert_close(
                group.signals[signal][place], values[0], atol=1e-4, rtol=1e-4
            )


def test_only_what_runs_is_loaded(family):
    name, path, model = family
    encoder = build(name, path)
    kept = encoder._reads(frozenset()).keys

    assert not [key for key in kept if "language_model" in key or "text_model" in key]
    assert not [key for key in kept if key.startswith("lm_head")]
    assert len(kept) < len(model.state_dict())


def test_a_description_changes_with_any_weight_that_is_read_and_no_other(family, tmp_path):
    name, path, _ = family
    first, again = build(name, path).describe(), build(name, path).describe()
    shutil.copytree(path, tmp_path / "copy")
    copy = build(name, tmp_path / "copy")
    assert copy.describe()["digest"] == first["digest"] == again["digest"]

    file = tmp_path / "copy" / "model.safetensors"
    stored, read = load_file(file), copy._reads(frozenset()).keys
    for key, is_seen in ((max(read), True), (min(stored.keys() - read), False)):
        save_file({**stored, key: stored[key] + 1}, file)
        changed = build(name, tmp_path / "copy").describe()["digest"] != first["digest"]
        assert changed == is_seen, key


def test_it_travels_to_other_processes_before_it_is_loaded(family):
    name, path, _ = family
    encoder = pickle.loads(pickle.dumps(build(name, path)))
    encoder.load()

    assert encoder.encode(IMAGES[:1])


def test_another_kind_of_model_is_refused(tmp_path):
    save_family(tmp_path, "gemma3")

    for encoder in (
        "llava_next",
        "llava_onevision",
        "paligemma",
        "internvl",
        "idefics3",
        "qwen_vl",
    ):
        with pytest.raises(ConfigError, match="is a 'gemma3'"):
            encoders.build(encoder, {"model": str(tmp_path)}).describe()


def test_another_image_processor_is_refused(tmp_path):
    save_family(tmp_path, "internvl")
    save_processor(tmp_path, CLIP_PROCESSOR)

    with pytest.raises(ConfigError, match=r"image processor of model .* is 'CLIPImageProcessor'"):
        encoders.build("internvl", {"model": str(tmp_path)}).describe()


def test_elongated_images_that_the_family_cannot_take_are_named(tmp_path):
    save_family(tmp_path, "qwen2_5_vl")
    encoder = encoders.build("qwen_vl", {"model": str(tmp_path)})

    with pytest.raises(EncodeError, match="1 x 201 pixels") as caught:
        encoder.preprocess(IMAGES[0][:201, :1])
    assert caught.value.reason == "too_elongated"


SHAPES = [(1, 1), (1, 60), (60, 1), (1, 190), (1, 1000), (1000, 1), (10, 1000), (1000, 10)]


def test_an_image_of_any_shape_is_taken_or_is_a_bad_sample(family):
    """Another error would cost its whole shard."""
    name, path, _ = family
    encoder = build(name, path)
    encoder.load()
    taken, refused = 0, []

    for height, width in SHAPES:
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        try:
            prepared = encoder.preprocess(image)
        except EncodeError as err:
            refused.append((err.reason, f"{width} x {height} pixels" in str(err)))
            continue
        taken += 1
        (group,) = encoder.encode_pixels([prepared])
        assert group.features.isfinite().all()

    assert taken
    assert set(refused) <= {("too_elongated", True)}


@pytest.mark.parametrize("name", ["internvl", "internvl_normed", "idefics3", "smolvlm"])
def test_signals_are_what_eager_attention_shows(name, tmp_path):
    model = save_family(tmp_path, name)
    encoder = build(name, tmp_path)
    encoder.load(signals=encoder.yields)
    tower = getattr(model.model, "vision_tower", None) or model.model.vision_model
    tower.set_attn_implementation("eager")
    (group,) = encoder.encode(IMAGES[4:])
    pixels = upstream_inputs(tmp_path, name, IMAGES[4])["pixel_values"].flatten(0, -4)
    pixels = pixels.roll(1, dims=0)  # the thumbnail first

    with torch.inference_mode():
        weights = tower(pixels, output_attentions=True).attentions[-1]
    first = weights.shape[-1] - 16
    received = units(weights[:, :, first:, first:].mean(dim=(1, 2))).sum(dim=(2, 4)).flatten()
    torch.testing.assert_close(group.signals["received_attention"][0], received)
    if first:
        from_class = units(weights[:, :, 0, 1:].mean(dim=1)).sum(dim=(2, 4)).flatten()
        torch.testing.assert_close(group.signals["cls_attention"][0], from_class)


def units(values):
    """Return (V, 2, 2, 2, 2): 4 x 4 patches in squares of 2 x 2."""
    return values.view(len(values), 2, 2, 2, 2)


def test_signals_of_windows_stand_at_their_tokens(tmp_path):
    """With one layer of full attention windows change nothing but the order of the work."""
    model = save_family(tmp_path, "qwen2_5_vl")
    config = json.loads((tmp_path / "config.json").read_text())
    found = []
    for window in (28, 2800):
        config["vision_config"] |= {"depth": 1, "fullatt_block_indexes": [0], "window_size": window}
        (tmp_path / "config.json").write_text(json.dumps(config))
        encoder = build("qwen2_5_vl", tmp_path)
        encoder.load(signals=encoder.yields)
        (group,) = encoder.encode(IMAGES[:2])
        found.append(group.signals)

    assert found[0].keys() == encoder.yields
    for signal, values in found[0].items():
        torch.testing.assert_close(values, found[1][signal], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[0]["received_attention"].sum(dim=1), torch.ones(2))
    assert found[0]["keys"].shape[2] == model.config.vision_config.hidden_size
