"""Vision towers: plain transformers from pixels to one token per patch, run no deeper than needed.

T is the number of a tower's tokens: its class token and registers, if it has them, then N patches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from pipeline.encoders._signals import AttentionProbe
from pipeline.encoders._weights import Checkpoint, Source, fill, locate
from pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where towers of one kind keep their parts, as dotted names in the transformers class."""

    model: str  # name of the class
    layers: str
    attention: str  # in a layer
    output: str  # in the attention: its last linear map
    norm: str  # what turns the last hidden state into `last_hidden_state`, if that is normed
    norm_is_applied: bool
    entry: str | None = None  # between embeddings and the first layer
    has_class_token: bool = True
    takes_any_size: bool = False  # interpolates its position embeddings


_DINO = Family(
    model="Dinov2Model",
    layers="encoder.layer",
    attention="attention",
    output="o_proj",
    norm="layernorm",
    norm_is_applied=True,
    takes_any_size=True,
)
FAMILIES: Mapping[str, Family] = {
    "clip_vision_model": Family(
        model="CLIPVisionModel",
        layers="encoder.layers",
        attention="self_attn",
        output="out_proj",
        norm="post_layernorm",
        norm_is_applied=False,  # to the class token only, for the pooled output
        entry="pre_layrnorm",
    ),
    "siglip_vision_model": Family(
        model="SiglipVisionModel",
        layers="encoder.layers",
        attention="self_attn",
        output="out_proj",
        norm="post_layernorm",
        norm_is_applied=True,
        has_class_token=False,
    ),
    "dinov2": _DINO,
    "dinov2_with_registers": Family(**{**vars(_DINO), "model": "Dinov2WithRegistersModel"}),
}


@dataclass(frozen=True, kw_only=True)
class TowerPlan:
    """Which hidden states of which tower are wanted; known from the config alone.

    Attributes:
        config: of the tower, a transformers config.
        states: indices of hidden states, 0 (the embeddings) to the number of layers, in the order
            wanted.
        final_norm: whether the last layer's state goes through the norm that the family's
            `last_hidden_state` has.
    """

    config: Any
    states: tuple[int, ...]
    final_norm: bool

    @property
    def family(self) -> Family:
        """The parts of this kind of tower."""
        return FAMILIES[self.config.model_type]

    @property
    def depth(self) -> int:
        """Number of layers that run; the last of them is the one signals are taken from."""
        return max(self.states)

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches: class token and registers."""
        return int(self.family.has_class_token) + getattr(self.config, "num_register_tokens", 0)

    @property
    def patch_size(self) -> int:
        """Edge of a patch in pixels."""
        return int(self.config.patch_size)

    @property
    def attention_signals(self) -> frozenset[str]:
        """Signals that the last layer to run can give."""
        if not self.depth:
            return frozenset()
        names = {"received_attention", "keys", "attention_output"}
        return frozenset(names | ({"cls_attention"} if self.family.has_class_token else set()))

    def check_size(self, size: tuple[int, int] | None, *, model: str) -> None:
        """Check that the image processor makes what the tower takes.

        Raises:
            ConfigError: it does not.
        """
        expected = (int(self.config.image_size),) * 2
        if not self.family.takes_any_size and size != expected:
            raise ConfigError(
                f"model {model!r}: its image processor gives {size or 'images of any size'}, its "
                f"tower takes {expected}; correct preprocessor_config.json"
            )

    def trim(self, height: int, width: int) -> tuple[int, int]:
        """Return the part of an image that becomes patches; the tower ignores the rest."""
        if not self.family.takes_any_size:
            return height, width
        edge = self.patch_size
        return height // edge * edge, width // edge * edge

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of patches of an image."""
        return height // self.patch_size, width // self.patch_size


def plan_tower(config: Any, layers: Sequence[int], *, final_norm: bool, where: str) -> TowerPlan:  # noqa: ANN401
    """Check a tower's config and the hidden states asked of it.

    Args:
        config: of the tower, a transformers config.
        layers: indices of hidden states; negative ones count from the last layer.
        final_norm: as in `TowerPlan`.
        where: the option or setting that names the layers, for messages.

    Raises:
        ConfigError: not a known family, patches that are not squares, or no such layer.
    """
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"vision tower of type {config.model_type!r} is not supported; known: "
            f"{', '.join(FAMILIES)}"
        )
    for name in ("patch_size", "image_size"):
        if not isinstance(getattr(config, name), int):
            raise ConfigError(f"{name} {getattr(config, name)!r} is not supported; squares only")
    count = config.num_hidden_layers + 1
    wrong = [layer for layer in layers if not -count <= layer < count]
    if wrong or not layers:
        raise ConfigError(
            f"{where} {wrong or list(layers)} is out of range; the tower has hidden states "
            f"0 to {count - 1}, or {-count} to -1"
        )
    states = tuple(layer % count for layer in layers)
    return TowerPlan(config=config, states=states, final_norm=final_norm)


class Tower:
    """A loaded vision tower without its unused layers.

    Args:
        plan: what to run.
        checkpoint: where the weights are.
        prefixes: what may stand before the tower's keys in the checkpoint.
        device: where it runs.
        dtype: of its weights and results.
        signals: names of the attention signals wanted.

    Raises:
        ConfigError: a needed tensor is missing, or of another shape or kind than expected.
    """

    def __init__(
        self,
        plan: TowerPlan,
        checkpoint: Checkpoint,
        *,
        prefixes: Sequence[str],
        device: torch.device | str,
        dtype: torch.dtype,
        signals: frozenset[str],
    ) -> None:
        self.plan = plan
        self._model = _skeleton(plan)
        sources = _sources(self._model, checkpoint, prefixes)
        fill(self._model, checkpoint, sources, device=device, dtype=dtype)
        _restore_buffers(self._model, device)
        family = plan.family
        self._layers: Sequence[nn.Module] = list(self._model.get_submodule(family.layers))
        self._probe = None
        if signals:
            attention = self._layers[-1].get_submodule(family.attention)
            self._probe = AttentionProbe(
                attention,
                output=family.output,
                num_heads=plan.config.num_attention_heads,
                signals=signals,
            )

    def __call__(self, pixels_BCHW: Tensor) -> list[Tensor]:
        """Return the (B, T, D) hidden states that the plan names, in its order."""
        hidden_BTD = self._model.embeddings(pixels_BCHW)
        if self.plan.family.entry is not None:
            hidden_BTD = self._model.get_submodule(self.plan.family.entry)(hidden_BTD)
        states = {0: hidden_BTD} if 0 in self.plan.states else {}
        for number, layer in enumerate(self._layers, start=1):
            hidden_BTD = layer(hidden_BTD, None)
            if number in self.plan.states:
                states[number] = hidden_BTD
        if _norms(self.plan):
            last = self.plan.config.num_hidden_layers
            states[last] = self._model.get_submodule(self.plan.family.norm)(states[last])
        return [states[index] for index in self.plan.states]

    def signals(self, start: int) -> dict[str, Tensor]:
        """Return the signals of the call just made, for the tokens from `start` on.

        They are taken from the last layer that ran, and are float32 as `types.SIGNALS` says.
        """
        return self._probe.take(start) if self._probe is not None else {}


def tower_keys(plan: TowerPlan, checkpoint: Checkpoint, prefixes: Sequence[str]) -> frozenset[str]:
    """Return the names of the stored tensors that a `Tower` reads.

    Raises:
        ConfigError: one is missing.
    """
    sources = _sources(_skeleton(plan), checkpoint, prefixes)
    return frozenset(source.key for source in sources.values())


def _sources(
    model: nn.Module, checkpoint: Checkpoint, prefixes: Sequence[str]
) -> dict[str, Source]:
    names = [name for name, _ in model.named_parameters()]
    return locate(checkpoint, names, prefixes=prefixes, layouts=(Source, _old_dino_source))


def _norms(plan: TowerPlan) -> bool:
    """Whether the norm behind the last layer is used."""
    is_last = plan.config.num_hidden_layers in plan.states
    return plan.final_norm and plan.family.norm_is_applied and is_last


def _skeleton(plan: TowerPlan) -> Any:  # noqa: ANN401
    """Build the part of the tower that runs, without memory for its weights."""
    config = type(plan.config).from_dict(plan.config.to_dict())
    config.num_hidden_layers = plan.depth
    if config.model_type == "siglip_vision_model":
        config.vision_use_head = False
    with torch.device("meta"):
        model = getattr(transformers, plan.family.model)(config)
    if not _norms(plan):
        setattr(model, plan.family.norm, nn.Identity())
    if getattr(model.embeddings, "mask_token", None) is not None:
        model.embeddings.mask_token = None  # used in pre-training only
    return model.eval()


def _restore_buffers(model: nn.Module, device: torch.device | str) -> None:
    """Give position ids their values; checkpoints do not hold them."""
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            assert name == "position_ids", name
            ids = torch.arange(buffer.shape[-1], device=device).expand(1, -1)
            module.register_buffer(name, ids, persistent=False)


def _old_dino_source(name: str) -> Source:
    """Spell a DINOv2 parameter as its published checkpoints do."""
    for new, old in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        name = name.replace(f".attention.{old}.", f".attention.attention.{new}.")
    name = name.replace(".attention.o_proj.", ".attention.output.dense.")
    name = name.replace(".mlp.down_proj.", ".mlp.weights_out.")
    for part, gate in enumerate(("gate_proj", "up_proj")):
        if f".mlp.{gate}." in name:  # both halves are stored as one matrix
            return Source(name.replace(f".mlp.{gate}.", ".mlp.weights_in."), part, 2)
    return Source(name)
