"""Which bytes of a checkpoint are read, what is refused, and what identifies its content."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pipeline import encoders
from pipeline.errors import ConfigError
from tests.encoders.tiny_families import save_family
from tests.encoders.tiny_models import photo, save_llava, save_vit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SIGNALS = frozenset({"cls_attention", "llm_hidden", "llm_attention"})
LAYOUTS = {
    "as saved today": {},
    "with a vision_model inside": {"vision_tower.": "vision_tower.vision_model."},
    "under model": {
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
    },
    "under model, with a vision_model inside": {
        "vision_tower.": "model.vision_tower.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "language_model.model.": "model.language_model.",
    },
}


def encode(model, *, signals=SIGNALS, dtype=torch.float32, **options):
    encoder = encoders.build("llava", {"model": str(model), **options})
    encoder.load(signals=signals, dtype=dtype)
    (tokens,) = encoder.encode([photo()])
    return tokens


def describe(model, **options):
    return encoders.build("llava", {"model": str(model), **options}).describe()


def rewrite(path, change):
    """Change the tensors of a checkpoint of one file."""
    tensors = load_file(path / "model.safetensors")
    save_file(change(dict(tensors)), path / "model.safetensors")


def renamed(tensors, names):
    result = {}
    for key, tensor in tensors.items():
        old = next((old for old in names if key.startswith(old)), None)
        result[key if old is None else names[old] + key.removeprefix(old)] = tensor
    return result


@pytest.mark.parametrize("names", LAYOUTS.values(), ids=LAYOUTS)
def test_every_known_spelling_of_the_keys_is_read(tmp_path, names):
    save_llava(tmp_path)
    expected = encode(tmp_path)
    rewrite(tmp_path, lambda tensors: renamed(tensors, names))

    tokens = encode(tmp_path)

    assert torch.equal(tokens.features, expected.features)
    for name in SIGNALS:
        assert torch.equal(tokens.signals[name], expected.signals[name])


def test_the_same_spelling_as_before_transformers_5_is_read_for_dinov2(tmp_path):
    save_vit(tmp_path, "dinov2_swiglu")

    keys = load_file(tmp_path / "model.safetensors").keys()

    assert any("attention.attention.query" in key for key in keys)
    assert any("mlp.weights_in" in key for key in keys)
    encoders.build("vit", {"model": str(tmp_path)}).load()


def test_of_a_sharded_checkpoint_only_needed_files_are_opened(tmp_path):
    save_llava(tmp_path / "whole")
    expected = encode(tmp_path / "whole", signals=frozenset())
    save_llava(tmp_path, max_shard_size="12KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = {}
    for key, file in index["weight_map"].items():
        files.setdefault(file, set()).add(key.split(".")[0])
    unneeded = [file for file, parts in files.items() if parts == {"language_model"}]
    for file in unneeded:
        (tmp_path / file).unlink()

    tokens = encode(tmp_path, signals=frozenset())

    assert len(unneeded) >= 2
    assert torch.equal(tokens.features, expected.features)
    with pytest.raises(ConfigError, match=r"has no model-0000.*safetensors"):
        encode(tmp_path, signals=frozenset({"llm_hidden"}))


def test_pickled_weights_are_refused_with_the_way_out(tmp_path):
    save_llava(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")

    with pytest.raises(ConfigError, match="a pickle that can run code; convert it"):
        encode(tmp_path)


def test_a_checkpoint_without_weights_is_refused(tmp_path):
    save_llava(tmp_path)
    (tmp_path / "model.safetensors").unlink()

    with pytest.raises(ConfigError, match="give a whole checkpoint"):
        encode(tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("", "option 'model' is empty"),
        ("/no/such/directory", "no model directory '/no/such/directory'"),
        ("./relative/nowhere", "no model directory"),
        ("a/b/c", "no model directory"),
    ],
)
def test_a_model_that_is_nowhere_is_refused(model, message):
    encoder = encoders.build("llava", {"model": model})

    with pytest.raises(ConfigError, match=message):
        encoder.width  # noqa: B018


def test_a_revision_of_a_local_directory_is_refused(tmp_path):
    save_llava(tmp_path)

    with pytest.raises(ConfigError, match="option 'revision' 'main' has no meaning"):
        describe(tmp_path, revision="main")


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_a_missing_or_broken_settings_file_is_named(tmp_path, name):
    save_llava(tmp_path)
    (tmp_path / name).write_text("{")

    with pytest.raises(ConfigError, match=name):
        describe(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match=f"has no {name}"):
        describe(tmp_path)


def test_a_missing_tensor_is_named(tmp_path):
    save_llava(tmp_path)
    key = "vision_tower.encoder.layers.1.mlp.fc1.bias"
    rewrite(tmp_path, lambda tensors: {k: v for k, v in tensors.items() if k != key})

    with pytest.raises(ConfigError, match=f"lacks 1 of .* first '{key}'"):
        encode(tmp_path)


def test_a_tensor_of_another_shape_is_named(tmp_path):
    save_llava(tmp_path)
    key = "vision_tower.encoder.layers.1.mlp.fc1.bias"
    rewrite(tmp_path, lambda tensors: tensors | {key: torch.zeros(7)})

    with pytest.raises(ConfigError, match=rf"{key}' .* is \[7\], its config.json says \[48\]"):
        encode(tmp_path)


def test_a_quantised_tensor_is_refused(tmp_path):
    save_llava(tmp_path)
    key = "vision_tower.encoder.layers.1.mlp.fc1.weight"
    rewrite(tmp_path, lambda tensors: tensors | {key: tensors[key].to(torch.int8)})

    with pytest.raises(ConfigError, match="stored as I8"):
        encode(tmp_path)


def cut_short(content):
    return content[: len(content) // 2]


def with_foreign_bytes(content):
    return b"not a safetensors file" + content


def with_damaged_header(content):
    return content[:8] + b"x" + content[9:]


@pytest.mark.parametrize("damage", [cut_short, with_foreign_bytes, with_damaged_header])
def test_a_damaged_file_is_refused_and_named(tmp_path, damage):
    save_llava(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))

    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        encode(tmp_path)


def test_an_index_that_points_outside_is_refused(tmp_path):
    save_llava(tmp_path, max_shard_size="12KB")
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    key = next(iter(index["weight_map"]))
    index["weight_map"][key] = "../elsewhere.safetensors"
    path.write_text(json.dumps(index))

    with pytest.raises(ConfigError, match="points outside"):
        encode(tmp_path)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_cast_to_the_type_asked_for(tmp_path, stored):
    save_llava(tmp_path)
    expected = encode(tmp_path)
    rewrite(tmp_path, lambda tensors: {k: v.to(stored) for k, v in tensors.items()})

    tokens = encode(tmp_path)

    assert tokens.features.dtype == torch.float32
    assert (tokens.features - expected.features).abs().max() < 0.1
    assert encode(tmp_path, dtype=torch.float16).features.dtype == torch.float16


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that is not reachable, and a cache that holds one commit of `org/tiny`."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    save_llava(snapshot)
    return snapshot


def test_a_hub_model_is_described_by_its_commit_without_its_weights(hub):
    (hub / "model.safetensors").rename(hub.parent / "weights")

    described = describe("org/tiny")

    assert described["model"] == "org/tiny"
    assert described["revision"] == COMMIT
    assert described["digest"] == describe("org/tiny", revision=COMMIT)["digest"]


def test_a_hub_model_gives_the_tokens_of_its_files(hub):
    expected = encode(hub)

    tokens = encode("org/tiny")

    assert torch.equal(tokens.features, expected.features)
    assert torch.equal(tokens.signals["llm_hidden"], expected.signals["llm_hidden"])


@pytest.mark.parametrize("options", [{"model": "org/other"}, {"revision": "v2"}])
def test_a_hub_model_that_cannot_be_reached_is_refused(hub, options):
    with pytest.raises(ConfigError, match="hub cannot be reached"):
        describe(**{"model": "org/tiny", **options})


MEASURE = """
import sys, torch
import numpy as np
from pipeline import encoders
from tests.process_memory import memory_bytes

def run(model):
    encoder = encoders.build(sys.argv[3], {"model": model})
    encoder.load(signals=frozenset({sys.argv[4]}))
    encoder.encode([np.zeros((40, 40, 3), np.uint8)])

run(sys.argv[1])
with open("/proc/self/clear_refs", "w") as control:
    control.write("5")  # forget the peak so far
before = memory_bytes("VmRSS")
run(sys.argv[2])
sys.stdout.write(str(memory_bytes("VmHWM") - before))
"""


def save_giant(path, *, tower_layers):
    """Write a model whose language model is 20 times the part of its tower that is used.

    The language model is a hole at the end of the file: it reads as zeros, takes as much memory as
    any weights where it is read, and no disk space.
    """
    save_llava(path)
    config = json.loads((path / "config.json").read_text())
    config["vision_config"] |= {"hidden_size": 512, "intermediate_size": 2048}
    config["vision_config"]["num_hidden_layers"] = tower_layers + 1
    (path / "config.json").write_text(json.dumps(config))
    tower = {}
    for key, tensor in load_file(path / "model.safetensors").items():
        if key.startswith("vision_tower."):
            tower[key] = torch.randn([{32: 512, 48: 2048}.get(n, n) for n in tensor.shape])
    first_layer = [key for key in tower if ".layers.0." in key]
    for layer in range(4, tower_layers + 1):
        for key in first_layer:
            tower[key.replace(".layers.0.", f".layers.{layer}.")] = tower[key]
    tower_bytes = sum(t.nbytes for k, t in tower.items() if f".layers.{tower_layers}." not in k)
    write_with_hole(path / "model.safetensors", tower, hole_floats=5 * tower_bytes)
    return tower_bytes


def write_with_hole(path, tensors, *, hole_floats):
    header, offset = {}, 0
    for key, tensor in tensors.items():
        header[key] = entry(list(tensor.shape), offset, tensor.nbytes)
        offset += tensor.nbytes
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    header[name] = entry([hole_floats], offset, 4 * hole_floats)
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for tensor in tensors.values():
            file.write(tensor.numpy())
        file.truncate(8 + len(encoded) + offset + 4 * hole_floats)


def entry(shape, offset, size):
    return {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}


def test_loading_costs_little_more_memory_than_the_tower(tmp_path):
    save_llava(tmp_path / "tiny")
    tower_bytes = save_giant(tmp_path / "giant", tower_layers=6)
    size = (tmp_path / "giant" / "model.safetensors").stat().st_size

    growth = measured_growth(tmp_path, "llava", "cls_attention")
    assert tower_bytes > 60e6
    assert size > 20 * tower_bytes
    assert 0.9 * tower_bytes < growth < 1.5 * tower_bytes


def measured_growth(path, encoder, signal):
    """Return how far memory grows when the giant is loaded, beyond what the tiny one took."""
    models = (str(path / "tiny"), str(path / "giant"))
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, *models, encoder, signal],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    return int(result.stdout)


@pytest.mark.slow
def test_a_tower_with_code_of_its_own_costs_little_more_than_itself_either(tmp_path):
    """Its whole model is built, the language model too, and none of that takes memory."""
    save_family(tmp_path / "tiny", "qwen2_5_vl")
    shutil.copytree(tmp_path / "tiny", tmp_path / "giant")
    config = json.loads((tmp_path / "giant" / "config.json").read_text())
    config["vision_config"] |= {
        "depth": 6,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "out_hidden_size": 1024,
    }
    language = {"hidden_size": 1024, "vocab_size": 300_000, "intermediate_size": 20_000}
    config["text_config"] |= language
    (tmp_path / "giant" / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        kind = transformers.Qwen2_5_VLConfig.from_dict(config)
        visual = transformers.Qwen2_5_VLModel(kind).visual
    tower = {f"visual.{k}": torch.randn(p.shape) for k, p in visual.named_parameters()}
    tower_bytes = sum(tensor.nbytes for tensor in tower.values())
    file = tmp_path / "giant" / "model.safetensors"
    write_with_hole(file, tower, hole_floats=5 * tower_bytes)

    growth = measured_growth(tmp_path, "qwen_vl", "received_attention")

    assert tower_bytes > 60e6
    assert file.stat().st_size > 20 * tower_bytes
    assert 0.9 * tower_bytes < growth < 1.5 * tower_bytes
