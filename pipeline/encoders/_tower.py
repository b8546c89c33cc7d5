"""Vision towers: plain transformers from pixels to one token per patch, run no deeper than needed.

T is the number of a tower's tokens: its class token and registers, if it has them, then N patches.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from pipeline.encoders._signals import ATTENTION_SIGNALS, AttentionProbe, linear_maps, map_names
from pipeline.encoders._tower_plan import Family, TowerPlan
from pipeline.encoders._weights import Checkpoint, Source, fill, locate


class Tower:
    """A loaded vision tower without its unused layers.

    Args:
        plan: what to run.
        checkpoint: where the weights are.
        prefixes: what may stand before the tower's keys in the checkpoint.
        device: where it runs.
        dtype: of its weights and results.
        signals: which of the plan's `attention_signals` are wanted.

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
        self._model = _skeleton(plan, signals)
        sources = _sources(self._model, checkpoint, prefixes)
        fill(self._model, checkpoint, sources, device=device, dtype=dtype)
        _restore_buffers(self._model, device)
        family = plan.family
        self._layers: Sequence[nn.Module] = list(self._model.get_submodule(family.layers))
        self._probes = {
            block: AttentionProbe(
                self._layers[block].get_submodule(family.attention),
                names=map_names(output=family.output),
                num_heads=plan.config.num_attention_heads,
                has_class=family.has_class_token,
                signals=names,
            )
            for block, names in plan.probed(signals).items()
        }

    def __call__(self, pixels_BCHW: Tensor, start: int) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Run the tower.

        Args:
            pixels_BCHW: normalised, of the tower's device and type.
            start: first token whose signals are wanted.

        Returns:
            The (B, T, D) hidden states that the plan names, in its order, and the signals of the
            tokens from `start` on, float32 as `types.SIGNALS` says.
        """
        hidden_BTD = self._model.embeddings(pixels_BCHW)
        if self.plan.family.entry is not None:
            hidden_BTD = self._model.get_submodule(self.plan.family.entry)(hidden_BTD)
        states = {0: hidden_BTD} if 0 in self.plan.states else {}
        signals: dict[str, list[Tensor]] = {}
        for block in range(len(self._layers)):
            hidden_BTD = self._run(block, hidden_BTD)
            if block + 1 in self.plan.states:
                states[block + 1] = hidden_BTD
            if block in self._probes:
                # At once, so that what was caught of one layer is freed before the next one runs.
                for name, signal in self._probes[block].take(start).items():
                    signals.setdefault(name, []).append(signal)
        if _norms(self.plan):
            last = self.plan.num_layers
            states[last] = self._model.get_submodule(self.plan.family.norm)(states[last])
        wanted = [states[index] for index in self.plan.states]
        return wanted, {name: _stacked(name, found) for name, found in signals.items()}

    def _run(self, block: int, hidden_BTD: Tensor) -> Tensor:
        """Run one layer; of the one behind all states only what its signals are made of."""
        layer = self._layers[block]
        if block + 1 < len(self._layers) or block < self.plan.depth:
            return layer(hidden_BTD, None)
        norm = layer.get_submodule(self.plan.family.attention_norm)
        self._probes[block].feed(norm(hidden_BTD))
        return hidden_BTD


def _stacked(name: str, found: list[Tensor]) -> Tensor:
    return torch.stack(found, dim=2) if ATTENTION_SIGNALS[name].place == "each" else found[0]


def tower_keys(
    plan: TowerPlan, checkpoint: Checkpoint, prefixes: Sequence[str], signals: frozenset[str]
) -> frozenset[str]:
    """Return the names of the stored tensors that a `Tower` reads for some signals.

    Raises:
        ConfigError: one is missing.
    """
    sources = _sources(_skeleton(plan, signals), checkpoint, prefixes)
    return frozenset(source.key for source in sources.values())


def _sources(
    model: nn.Module, checkpoint: Checkpoint, prefixes: Sequence[str]
) -> dict[str, Source]:
    names = [name for name, _ in model.named_parameters()]
    return locate(checkpoint, names, prefixes=prefixes, layouts=(Source, _old_dino_source))


def _norms(plan: TowerPlan) -> bool:
    """Whether the norm behind the last layer is used."""
    is_last = plan.num_layers in plan.states
    return plan.final_norm and plan.family.norm_is_applied and is_last


def _skeleton(plan: TowerPlan, signals: frozenset[str]) -> Any:  # noqa: ANN401
    """Build the part of the tower that runs, without memory for its weights."""
    config = type(plan.config).from_dict(plan.config.to_dict())
    config.num_hidden_layers = plan.num_run(signals)
    if config.model_type == "siglip_vision_model":
        config.vision_use_head = False
    with torch.device("meta"):
        model = getattr(transformers, plan.family.model)(config)
    if not _norms(plan):
        setattr(model, plan.family.norm, nn.Identity())
    if getattr(model.embeddings, "mask_token", None) is not None:
        model.embeddings.mask_token = None  # used in pre-training only
    if config.num_hidden_layers > plan.depth:
        last = model.get_submodule(plan.family.layers)[-1]
        _reduce_to_maps(last, plan.family, plan.probed(signals)[config.num_hidden_layers - 1])
    return model.eval()


def _reduce_to_maps(layer: nn.Module, family: Family, signals: frozenset[str]) -> None:
    """Take from a layer all that its own signals are not made of."""
    attention = layer.get_submodule(family.attention)
    maps = linear_maps(signals, map_names(output=family.output)).values()
    for module, kept in ((layer, (family.attention, family.attention_norm)), (attention, maps)):
        for name, _ in list(module.named_children()):
            if name not in kept:
                setattr(module, name, nn.Identity())


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
