"""What signals cost and what decides them: layers that run, weights that are read, options."""

from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig

from pipeline import encoders
from pipeline.encoders._tower_plan import plan_tower
from pipeline.errors import ConfigError, MissingSignalError
from tests.encoders.tiny_models import photo, save_llava, save_vit

LAST = {"last_cls_attention", "last_keys", "cls_logits"}
SHALLOW = {"shallow_attention", "shallow_keys"}
LAST_LAYER = "vision_tower.encoder.layers.3."
PROJECTOR = "multi_modal_projector.linear_1.weight"


def build(name, path, **options):
    return encoders.build(name, {"model": str(path), **options})


def encode(encoder, *names):
    encoder.load(signals=frozenset(names))
    (tokens,) = encoder.encode([photo("coffee"), photo("chelsea")])
    return tokens


def signal_of(encoder, name):
    return encode(encoder, name).signals[name]


def describe(path, *names, **options):
    return build("llava", path, **options).describe(frozenset(names))


def change(path, edit):
    tensors = load_file(path / "model.safetensors")
    save_file(edit(dict(tensors)), path / "model.safetensors")


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        ({"last_keys"}, {"layer_norm1", "self_attn.k_proj"}),
        ({"cls_logits", "keys"}, {"layer_norm1", "self_attn.k_proj", "self_attn.q_proj"}),
        ({"last_cls_attention"}, {"layer_norm1", "self_attn.k_proj", "self_attn.q_proj"}),
        ({"attention_flow", "shallow_keys", "mean_keys", "shallow_attention"}, set()),
    ],
)
def test_of_the_last_layer_only_what_its_signals_are_made_of_is_read(tmp_path, names, parts):
    save_llava(tmp_path)
    expected = encode(build("llava", tmp_path), "received_attention", *names).signals
    needed = {f"{LAST_LAYER}{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    change(
        tmp_path,
        lambda tensors: {
            name: tensor
            for name, tensor in tensors.items()
            if name in needed
            or (name.startswith("vision_tower.") and not name.startswith(LAST_LAYER))
        },
    )

    signals = encode(build("llava", tmp_path), "received_attention", *names).signals

    for name in names:
        assert torch.equal(signals[name], expected[name])


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "dinov2_with_registers"])
def test_a_signal_of_the_last_layer_needs_that_layer_in_the_checkpoint(tmp_path, kind):
    save_vit(tmp_path, kind)
    change(tmp_path, lambda tensors: {n: t for n, t in tensors.items() if ".3." not in n})

    assert signal_of(build("vit", tmp_path, layer=-2), "mean_keys").shape[2] == 8
    with pytest.raises(ConfigError, match=r"lacks 4 of .*\.3\."):
        signal_of(build("vit", tmp_path, layer=-2), "last_keys")


def test_projector_sensitivity_reads_no_part_of_the_language_model(tmp_path):
    save_llava(tmp_path)
    expected = signal_of(build("llava", tmp_path), "projector_sensitivity")
    change(tmp_path, lambda t: {n: v for n, v in t.items() if not n.startswith("language_model.")})

    assert torch.equal(signal_of(build("llava", tmp_path), "projector_sensitivity"), expected)
    change(tmp_path, lambda t: {n: v for n, v in t.items() if "projector" not in n})
    with pytest.raises(ConfigError, match="lacks 4 of 4 tensors"):
        signal_of(build("llava", tmp_path), "projector_sensitivity")


@pytest.fixture
def runs():
    """How often modules of each kind run."""
    counted = Counter()
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: counted.update([type(module).__name__])
    )
    yield counted
    handle.remove()


@pytest.mark.parametrize(
    ("layer", "names", "num_layers", "num_extra_maps"),
    [
        (-2, set(), 3, 0),
        (-2, {"shallow_attention", "attention_flow", "mean_keys"}, 3, 0),
        (-2, {"last_keys"}, 3, 1),
        (-2, {"cls_logits", "last_keys"}, 3, 2),
        (1, {"last_cls_attention"}, 3, 2),
        (1, {"keys"}, 1, 0),
        (-1, LAST, 4, 0),
    ],
)
def test_no_layer_runs_that_nothing_asks_for(
    tmp_path, runs, layer, names, num_layers, num_extra_maps
):
    save_llava(tmp_path, layer=layer)
    encoder = build("llava", tmp_path)

    encode(encoder, *names)

    assert runs["CLIPEncoderLayer"] == runs["CLIPMLP"] == num_layers
    assert runs["Linear"] == 6 * num_layers + num_extra_maps
    assert runs["LlavaMultiModalProjector"] == 0


def test_the_projector_does_not_run_for_its_sensitivity(tmp_path, runs):
    save_llava(tmp_path)
    encoder = build("llava", tmp_path)

    encode(encoder, "projector_sensitivity")

    assert runs["LlavaMultiModalProjector"] == 0
    assert runs["CLIPEncoderLayer"] == 3


def test_the_shallow_layer_is_three_eighths_of_the_tower_deep_if_not_given():
    config = CLIPVisionConfig(num_hidden_layers=24)

    plan = plan_tower(config, [-2], final_norm=False, where="layer", shallow_layer=None)

    assert plan.shallow_block == 9


@pytest.mark.parametrize("name", ["llava", "vit"])
@pytest.mark.parametrize(("layer", "shallow_layer"), [(-2, 3), (1, 1), (-1, -1), (-1, 4), (0, 0)])
def test_a_shallow_layer_behind_the_features_is_refused(tmp_path, name, layer, shallow_layer):
    save_llava(tmp_path / "llava", layer=layer)
    save_vit(tmp_path / "vit", "clip")
    options = {"layer": layer} if name == "vit" else {}
    encoder = build(name, tmp_path / name, shallow_layer=shallow_layer, **options)

    with pytest.raises(ConfigError, match=f"option 'shallow_layer' is {shallow_layer}, but"):
        encoder.load()
    with pytest.raises(ConfigError, match="option 'shallow_layer'"):
        encoder.describe()


def test_features_of_too_early_a_layer_have_no_shallow_signals_unless_one_is_given(tmp_path):
    save_vit(tmp_path, "clip")

    assert build("vit", tmp_path, layer=1).yields.isdisjoint(SHALLOW)
    with pytest.raises(MissingSignalError, match="'shallow_keys'"):
        encode(build("vit", tmp_path, layer=1), "shallow_keys")
    early = signal_of(build("vit", tmp_path, layer=1, shallow_layer=0), "shallow_keys")
    assert torch.equal(early, signal_of(build("vit", tmp_path, layer=1), "keys"))


@pytest.mark.parametrize("name", sorted(SHALLOW))
def test_the_shallow_layer_counts_only_with_its_signals(tmp_path, name):
    save_llava(tmp_path)

    assert describe(tmp_path, "keys", shallow_layer=2) == describe(tmp_path, "keys")
    assert "shallow_layer" not in describe(tmp_path)
    assert describe(tmp_path, name, shallow_layer=2) != describe(tmp_path, name)
    assert describe(tmp_path, name, shallow_layer=1) == describe(tmp_path, name)
    assert describe(tmp_path, name)["shallow_layer"] == 1


@pytest.mark.parametrize(
    ("key", "names", "counts"),
    [
        (f"{LAST_LAYER}self_attn.k_proj.bias", {"last_keys"}, True),
        (f"{LAST_LAYER}self_attn.q_proj.bias", {"cls_logits"}, True),
        (f"{LAST_LAYER}self_attn.q_proj.bias", {"last_keys"}, False),
        (f"{LAST_LAYER}mlp.fc1.bias", LAST, False),
        (f"{LAST_LAYER}self_attn.k_proj.bias", {"attention_flow", *SHALLOW}, False),
        (PROJECTOR, {"projector_sensitivity"}, True),
        (PROJECTOR, LAST, False),
    ],
)
def test_weights_count_with_the_signals_they_are_read_for(tmp_path, key, names, counts):
    save_llava(tmp_path)
    before = describe(tmp_path, *names), describe(tmp_path)

    change(tmp_path, lambda tensors: tensors | {key: tensors[key] + 1})

    assert (describe(tmp_path, *names) != before[0]) == counts
    assert describe(tmp_path) == before[1]
