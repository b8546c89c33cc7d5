"""Which layers of which vision tower run, known from its config alone.

A tower's tokens are its class token and registers, if it has them, then N patches.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.encoders._signals import ATTENTION_SIGNALS
from pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where towers of one kind keep their parts, as dotted names in the transformers class."""

    model: str  # name of the class
    layers: str
    attention: str  # in a layer
    output: str  # in the attention: its last linear map
    attention_norm: str  # in a layer: what its attention sees is normed by
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
    attention_norm="norm1",
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
        attention_norm="layer_norm1",
        norm="post_layernorm",
        norm_is_applied=False,  # to the class token only, for the pooled output
        entry="pre_layrnorm",
    ),
    "siglip_vision_model": Family(
        model="SiglipVisionModel",
        layers="encoder.layers",
        attention="self_attn",
        output="out_proj",
        attention_norm="layer_norm1",
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
        shallow_block: index of the layer that shallow signals are taken from; None where it would
            lie behind the states wanted.
    """

    config: Any
    states: tuple[int, ...]
    final_norm: bool
    shallow_block: int | None

    @property
    def family(self) -> Family:
        """The parts of this kind of tower."""
        return FAMILIES[self.config.model_type]

    @property
    def depth(self) -> int:
        """Number of layers that make the states; most signals are taken from the last of them."""
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
    def num_layers(self) -> int:
        """Number of layers of the whole tower."""
        return int(self.config.num_hidden_layers)

    @property
    def attention_signals(self) -> frozenset[str]:
        """Signals that the layers can give; none where the states are the embeddings alone."""
        return frozenset(
            name
            for name, signal in ATTENTION_SIGNALS.items()
            if self.depth
            and (self.family.has_class_token or not signal.needs_class)
            and (self.shallow_block is not None or signal.place != "shallow")
        )

    def probed(self, signals: frozenset[str]) -> dict[int, frozenset[str]]:
        """Return which of some `attention_signals` each layer gives, by its index from 0."""
        blocks: Mapping[str, Iterable[int | None]] = {
            "selected": [self.depth - 1],
            "shallow": [self.shallow_block],
            "last": [self.num_layers - 1],
            "each": range(self.depth),
        }
        found: dict[int, set[str]] = {}
        for name in signals:
            for block in blocks[ATTENTION_SIGNALS[name].place]:
                assert block is not None, name
                found.setdefault(block, set()).add(name)
        return {block: frozenset(names) for block, names in found.items()}

    def num_run(self, signals: frozenset[str]) -> int:
        """Return the number of layers that run, the last one perhaps in part, for some signals."""
        return max(self.depth, *(block + 1 for block in self.probed(signals)), 0)

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


def plan_tower(
    config: Any,  # noqa: ANN401
    layers: Sequence[int],
    *,
    final_norm: bool,
    where: str,
    shallow_layer: int | None,
) -> TowerPlan:
    """Check a tower's config and the hidden states asked of it.

    Args:
        config: of the tower, a transformers config.
        layers: indices of hidden states; negative ones count from the last layer.
        final_norm: as in `TowerPlan`.
        where: the option or setting that names the layers, for messages.
        shallow_layer: index of the layer for shallow signals, from 0; None for three eighths of
            the tower.

    Raises:
        ConfigError: not a known family, patches that are not squares, no such layer, or a shallow
            layer that is behind the others.
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
    return TowerPlan(
        config=config,
        states=states,
        final_norm=final_norm,
        shallow_block=_shallow_block(shallow_layer, num_layers=count - 1, depth=max(states)),
    )


def _shallow_block(asked: int | None, *, num_layers: int, depth: int) -> int | None:
    if asked is None:
        block = num_layers * 3 // 8
        return block if block < depth else None
    if not 0 <= asked < depth:
        known = f"ask for 0 to {depth - 1}" if depth else "leave it out"
        raise ConfigError(
            f"option 'shallow_layer' is {asked}, but the selected features are made by the first "
            f"{depth} of {num_layers} layers; {known}"
        )
    return asked
