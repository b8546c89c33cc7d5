"""Each signal against what transformers itself shows: eager attention weights and linear maps."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.activations import ACT2FN

from pipeline import encoders
from pipeline.encoders import _signals
from pipeline.errors import MissingSignalError
from pipeline.types import SIGNALS
from tests.encoders.tiny_models import EDGE, VISION, photo, save_llava, save_vit, upstream_pixels

HEADS = VISION["num_attention_heads"]
LAYERS = VISION["num_hidden_layers"]
OF_CLASS = {"cls_attention", "last_cls_attention", "cls_logits", "attention_flow"}
LLM = {"llm_hidden", "llm_attention"}
NUM_PREFIX = {"clip": 1, "siglip": 0, "dinov2": 1, "dinov2_with_registers": 5}


def images_of(path):
    """Return images of the size that the processor leaves alone: pixels are not at issue."""
    settings = json.loads((path / "preprocessor_config.json").read_text())["size"]
    edge = settings.get("shortest_edge", EDGE)
    photos = [Image.fromarray(photo(name)) for name in ("coffee", "chelsea")]
    return [np.asarray(image.resize((edge, edge))) for image in photos]


def build(name, path, **options):
    return encoders.build(name, {"model": str(path), **options})


def encode(encoder, *names, images=None, **loading):
    encoder.load(signals=frozenset(names), **loading)
    (tokens,) = encoder.encode(images or images_of(Path(encoder.model)))
    return tokens


def signals_of(encoder, *names, images=None):
    tokens = encode(encoder, *names, images=images)
    return tokens.signals if len(names) > 1 else tokens.signals[names[0]]


def features_of(encoder):
    return encode(encoder).features.clone()  # made in inference mode; a copy can be differentiated


def upstream(tower, path):
    """Return attention weights by layer, and by name and layer what linear maps gave."""
    tower.set_attn_implementation("eager")
    made = {"q": {}, "k": {}, "v": {}}
    maps = [m for n, m in tower.named_modules() if n.endswith(("q_proj", "k_proj", "v_proj"))]
    names = [n for n, _ in tower.named_modules() if n.endswith(("q_proj", "k_proj", "v_proj"))]
    for name, module in zip(names, maps, strict=True):
        block = next(int(part) for part in name.split(".") if part.isdigit())
        into = made[name.split(".")[-1][0]]
        module.register_forward_hook(lambda m, i, out, into=into, b=block: into.update({b: out}))
    with torch.inference_mode():
        output = tower(upstream_pixels(path, images_of(path)), output_attentions=True)
    return output.attentions, made


def head(values_BTD, number):
    width = values_BTD.shape[-1] // HEADS
    return values_BTD[..., number * width : (number + 1) * width]


def mean_over_heads(compute):
    return sum(compute(number) for number in range(HEADS)) / HEADS


def close(actual, expected, atol=1e-5, rtol=1e-4):
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


@pytest.mark.parametrize("kind", ["clip", "dinov2", "dinov2_with_registers"])
@pytest.mark.parametrize(("asked", "block"), [(None, 1), (0, 0), (2, 2)])
def test_shallow_attention_is_the_class_tokens_row_of_that_layer(tmp_path, kind, asked, block):
    weights, _ = upstream(save_vit(tmp_path, kind), tmp_path)

    signal = signals_of(build("vit", tmp_path, layer=-2, shallow_layer=asked), "shallow_attention")

    close(signal, weights[block][:, :, 0, NUM_PREFIX[kind] :].mean(dim=1))


def test_shallow_attention_without_class_token_is_what_tokens_receive(tmp_path):
    weights, _ = upstream(save_vit(tmp_path, "siglip"), tmp_path)

    signal = signals_of(build("vit", tmp_path), "shallow_attention")

    close(signal, weights[1].mean(dim=(1, 2)))


@pytest.mark.parametrize("kind", NUM_PREFIX)
def test_keys_of_three_layers_are_those_of_their_linear_maps(tmp_path, kind):
    _, made = upstream(save_vit(tmp_path, kind), tmp_path)
    keys = {block: k_BTD[:, NUM_PREFIX[kind] :] for block, k_BTD in made["k"].items()}

    signals = signals_of(
        build("vit", tmp_path, layer=-2), "shallow_keys", "last_keys", "keys", "mean_keys"
    )

    close(signals["shallow_keys"], keys[1])
    close(signals["keys"], keys[2])
    close(signals["mean_keys"], mean_over_heads(lambda h: head(keys[2], h)))
    close(signals["last_keys"], keys[3])


@pytest.mark.parametrize("kind", ["clip", "dinov2_with_registers"])
@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_last_cls_attention_takes_the_heads_of_the_last_layer_as_one(tmp_path, kind, layer):
    _, made = upstream(save_vit(tmp_path, kind), tmp_path)
    queries, keys = made["q"][LAYERS - 1], made["k"][LAYERS - 1]
    products = (queries[:, :1] * keys).sum(dim=-1) / math.sqrt(VISION["hidden_size"])
    expected = torch.softmax(products, dim=-1)[:, NUM_PREFIX[kind] :]

    signal = signals_of(build("vit", tmp_path, layer=layer), "last_cls_attention")

    close(signal, expected)


@pytest.mark.parametrize("kind", ["clip", "dinov2_with_registers"])
@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_cls_logits_are_what_the_last_layers_softmax_is_fed(tmp_path, kind, layer):
    weights, made = upstream(save_vit(tmp_path, kind), tmp_path)
    queries, keys = made["q"][LAYERS - 1][:, :1], made["k"][LAYERS - 1][:, NUM_PREFIX[kind] :]
    scale = (VISION["hidden_size"] // HEADS) ** -0.5

    signal = signals_of(build("vit", tmp_path, layer=layer), "cls_logits")

    close(signal, mean_over_heads(lambda h: (head(queries, h) * head(keys, h)).sum(-1)) * scale)
    logs = weights[-1][:, :, 0, NUM_PREFIX[kind] :].log().mean(dim=1)
    away = signal - logs  # the same for all tokens of an image: what the softmax divides by
    close(away, away.mean(dim=1, keepdim=True).expand_as(away))


@pytest.mark.parametrize("kind", ["clip", "dinov2_with_registers"])
@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_attention_flow_holds_three_numbers_of_every_layer_that_runs(tmp_path, kind, layer):
    weights, made = upstream(save_vit(tmp_path, kind), tmp_path)
    start, depth = NUM_PREFIX[kind], layer % (LAYERS + 1)

    signal = signals_of(build("vit", tmp_path, layer=layer), "attention_flow")

    assert signal.shape == (2, 16 if kind == "clip" else 25, depth, 3)
    for block in range(depth):
        values = made["v"][block]
        similar = mean_over_heads(
            lambda h, v=values: (head(v[:, :1], h) * head(v, h)).sum(dim=-1).softmax(dim=-1)
        )
        mean_value = mean_over_heads(lambda h, v=values: head(v, h))
        close(signal[:, :, block, 0], weights[block][:, :, 0, start:].mean(dim=1))
        close(signal[:, :, block, 1], similar[:, start:])
        close(signal[:, :, block, 2], torch.linalg.vector_norm(mean_value[:, start:], 1, dim=-1))


def test_signals_of_llava_are_those_of_its_tower(tmp_path):
    model = save_llava(tmp_path)
    weights, made = upstream(model.model.vision_tower, tmp_path)

    signals = signals_of(build("llava", tmp_path), *(SIGNALS.keys() - {"projector_sensitivity"}))

    close(signals["shallow_attention"], weights[1][:, :, 0, 1:].mean(dim=1))
    close(signals["shallow_keys"], made["k"][1][:, 1:])
    close(signals["cls_attention"], weights[2][:, :, 0, 1:].mean(dim=1))
    close(signals["keys"], made["k"][2][:, 1:])
    close(signals["last_keys"], made["k"][3][:, 1:])
    close(signals["attention_flow"][:, :, 2, 0], signals["cls_attention"])


def test_a_class_token_among_the_features_has_signals_too(tmp_path):
    model = save_llava(tmp_path, strategy="full")
    weights, made = upstream(model.model.vision_tower, tmp_path)

    signals = signals_of(build("llava", tmp_path), "shallow_attention", "last_keys", "cls_logits")

    close(signals["shallow_attention"], weights[1][:, :, 0].mean(dim=1))
    close(signals["last_keys"], made["k"][3])
    assert signals["cls_logits"].shape == (2, 17)


def gains(model, features_BND, activation):
    """Return the root mean square gain by the Jacobian of the projector itself, token by token."""
    projector = model.model.multi_modal_projector
    projector.act = ACT2FN[activation]
    rows = features_BND.flatten(0, 1)
    jacobians = torch.func.vmap(torch.func.jacrev(projector))(rows)
    return jacobians.square().mean(dim=2).sum(dim=1).sqrt().view(features_BND.shape[:2])


def with_activation(path, name):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"projector_hidden_act": name}))


@pytest.mark.parametrize("stage", ["pre_projector", "projected"])
@pytest.mark.parametrize(
    "activation", ["gelu", "gelu_pytorch_tanh", "quick_gelu", "silu", "relu", "linear"]
)
def test_projector_sensitivity_is_the_size_of_the_jacobian(tmp_path, stage, activation):
    model = save_llava(tmp_path)
    with_activation(tmp_path, activation)
    features = features_of(build("llava", tmp_path))

    signal = signals_of(build("llava", tmp_path, stage=stage), "projector_sensitivity")

    close(signal, gains(model, features, activation).detach(), atol=0, rtol=1e-5)


def test_projector_sensitivity_spans_all_selected_layers(tmp_path):
    model = save_llava(tmp_path, layer=[-2, 1], tower="siglip", strategy="full")
    features = features_of(build("llava", tmp_path))

    signal = signals_of(build("llava", tmp_path), "projector_sensitivity")

    assert features.shape == (2, 16, 64)
    close(signal, gains(model, features, "gelu").detach(), atol=0, rtol=1e-5)


def test_projector_sensitivity_is_the_growth_of_small_random_changes(tmp_path):
    model = save_llava(tmp_path)
    projector = model.model.multi_modal_projector.double()
    features = features_of(build("llava", tmp_path)).double()
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4000, 1, 1, features.shape[-1], generator=generator).double()
    directions = 1e-5 * directions / directions.norm(dim=-1, keepdim=True)
    with torch.inference_mode():
        moved = projector(features + directions) - projector(features - directions)
    expected = (moved.norm(dim=-1) / 2e-5).square().mean(dim=0).sqrt()

    signal = signals_of(build("llava", tmp_path), "projector_sensitivity")

    close(signal, expected.float(), atol=0, rtol=0.02)


def test_a_projector_that_passes_nothing_has_no_gain(tmp_path):
    save_llava(tmp_path)
    with_activation(tmp_path, "relu")
    change(tmp_path, lambda t: t | {"multi_modal_projector.linear_1.bias": torch.full((24,), -1e4)})

    signal = signals_of(build("llava", tmp_path), "projector_sensitivity")

    assert torch.equal(signal, torch.zeros(2, 16))


def change(path, edit):
    tensors = load_file(path / "model.safetensors")
    save_file(edit(dict(tensors)), path / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_signals_of_a_model_in_half_precision_are_float32(tmp_path, dtype):
    save_llava(tmp_path)
    names = build("llava", tmp_path).yields
    exact = signals_of(build("llava", tmp_path), *names)

    tokens = encode(build("llava", tmp_path), *names, dtype=dtype)

    assert set(tokens.signals) == names == set(SIGNALS)
    for name, signal in tokens.signals.items():
        assert signal.dtype == torch.float32
        assert (signal - exact[name]).norm() < 0.05 * exact[name].norm(), name


@pytest.mark.parametrize("name", sorted(SIGNALS.keys() - LLM))
def test_signals_of_an_image_do_not_depend_on_its_batch_mates(tmp_path, name):
    save_llava(tmp_path)
    encoder = build("llava", tmp_path)
    first, second = images_of(tmp_path)
    together = signals_of(encoder, name, images=[first, second, first])

    alone = signals_of(encoder, name, images=[second])

    close(together[1:2], alone, atol=1e-6)
    close(together[0], together[2], atol=1e-6)


@pytest.mark.parametrize(("name", "layer"), [("vit", -1), ("llava", -2)])
def test_without_class_token_its_signals_are_not_given(tmp_path, name, layer):
    save_llava(tmp_path / "llava", tower="siglip", strategy="full")
    save_vit(tmp_path / "vit", "siglip")
    encoder = build(name, tmp_path / name)

    of_tower = SIGNALS.keys() - LLM - {"projector_sensitivity"}
    assert encoder.yields & of_tower == of_tower - OF_CLASS
    with pytest.raises(MissingSignalError, match="'cls_logits'"):
        encoder.load(signals=frozenset({"cls_logits"}))


@pytest.mark.parametrize("most", [1, 100, 5 * 4 * 17, 3 * 5 * 4 * 17, 10**6])
def test_attention_in_blocks_is_the_attention_and_no_block_is_larger_than_allowed(
    monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    num_heads, num_queries, num_keys = 4, 5, 17
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(3, num_heads, num_queries, 8, generator=generator)
    keys = torch.randn(3, num_heads, num_keys, 8, generator=generator)
    weights = (queries @ keys.transpose(-1, -2) / 8**0.5).softmax(dim=-1)
    blocks, softmax = [], torch.softmax

    def watched(values, dim):
        blocks.append(values.numel())
        return softmax(values, dim=dim)

    monkeypatch.setattr(torch, "softmax", watched)
    monkeypatch.setattr(_signals, "_MAX_WEIGHTS", most)
    found = _signals.mean_attention(queries, keys, 2)

    torch.testing.assert_close(found, weights.mean(dim=(1, 2))[:, 2:], atol=1e-6, rtol=0)
    assert max(blocks) <= max(most, num_heads * num_keys)  # of one query at least
