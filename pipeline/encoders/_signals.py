"""What the attention of a tower's layers says about its tokens.

Fused attention never shows its weights. Queries, keys and values are therefore caught where they
are made, and only the sums that a signal needs are computed from them, in float32; the layer
itself keeps its fast path. A signal is a row of `ATTENTION_SIGNALS`: which layer, what of its
attention, and a function of that.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

# Elements of the largest block of attention weights held at once, by one query at least: 64 MiB.
_MAX_WEIGHTS = 2**24

Part = Literal["queries", "keys", "values", "output"]
Place = Literal["selected", "shallow", "last", "each"]


@dataclass(frozen=True, kw_only=True)
class Attention:
    """What the attention of one layer made of T tokens.

    Attributes:
        parts: (B, T, H * d) queries, keys, values before the attention, output behind it; those
            that were caught.
        num_heads: H.
        start: the first token whose signals are wanted.
        has_class: whether token 0 is a class token.
    """

    parts: Mapping[Part, Tensor]
    num_heads: int
    start: int
    has_class: bool

    def heads(self, part: Part) -> Tensor:
        """Return a part of all tokens as (B, H, T, d)."""
        values_BTD = self.parts[part]
        return split_heads(values_BTD, values_BTD.shape[-1] // self.num_heads)

    def rows(self, part: Part) -> Tensor:
        """Return a part of the wanted tokens as (B, N, H * d) float32."""
        return self.parts[part][:, self.start :].float().contiguous()


def split_heads(values_BTD: Tensor, head_width: int) -> Tensor:
    """Return (B, T, H * d) values as (B, H, T, d)."""
    return values_BTD.view(*values_BTD.shape[:-1], -1, head_width).transpose(1, 2)


def mean_attention(
    queries_BHQd: Tensor, keys_BHTd: Tensor, start: int, *, scale: float | None = None
) -> Tensor:
    """Return the attention each token from `start` on receives, mean over queries and heads.

    The softmax runs over all T keys; weights of the tokens before `start` are dropped without
    renormalising.

    Args:
        queries_BHQd: (B, H, Q, d), any float dtype.
        keys_BHTd: (B, H, T, d), any float dtype.
        start: first token wanted.
        scale: of the products before the softmax; None for d ** -0.5.

    Returns:
        (B, T - start) float32 in [0, 1].
    """
    num_images, num_heads, num_queries, head_width = queries_BHQd.shape
    if scale is None:
        scale = head_width**-0.5
    per_query = num_heads * keys_BHTd.shape[2]
    images = max(1, _MAX_WEIGHTS // (per_query * num_queries))
    queries = max(1, min(num_queries, _MAX_WEIGHTS // per_query))
    blocks = []
    for first in range(0, num_images, images):
        keys_bHdT = keys_BHTd[first : first + images].float().transpose(-1, -2)
        received_bT = keys_bHdT.new_zeros(len(keys_bHdT), keys_bHdT.shape[-1])
        # One image of many tokens, as of a tower of native resolution, is cut by its queries.
        for query in range(0, num_queries, queries):
            some_bHqd = queries_BHQd[first : first + images, :, query : query + queries].float()
            weights_bHqT = torch.softmax(some_bHqd * scale @ keys_bHdT, dim=-1)
            received_bT += weights_bHqT.mean(dim=(1, 2)) * (some_bHqd.shape[2] / num_queries)
        blocks.append(received_bT[:, start:])
    return torch.cat(blocks)


def _class_attention(attention: Attention) -> Tensor:
    queries_BH1d = attention.heads("queries")[:, :, :1]
    return mean_attention(queries_BH1d, attention.heads("keys"), attention.start)


def _received_attention(attention: Attention) -> Tensor:
    queries_BHNd = attention.heads("queries")[:, :, attention.start :]
    return mean_attention(queries_BHNd, attention.heads("keys"), attention.start)


def _class_or_received_attention(attention: Attention) -> Tensor:
    return (_class_attention if attention.has_class else _received_attention)(attention)


def _joined_class_attention(attention: Attention) -> Tensor:
    return _class_attention(dataclasses.replace(attention, num_heads=1))


def _class_logits(attention: Attention) -> Tensor:
    query_BD1 = attention.parts["queries"][:, 0, :, None].float()
    head_width = query_BD1.shape[1] // attention.num_heads
    # The sum over heads of their products is the product of the joined vectors.
    logits_BN = (attention.rows("keys") @ query_BD1).squeeze(-1)
    return logits_BN * (head_width**-0.5 / attention.num_heads)


def _keys(attention: Attention) -> Tensor:
    return attention.rows("keys")


def _mean_keys(attention: Attention) -> Tensor:
    return attention.heads("keys")[:, :, attention.start :].float().mean(dim=1)


def _output(attention: Attention) -> Tensor:
    return attention.rows("output")


def _flow(attention: Attention) -> Tensor:
    """Return (B, N, 3): class attention, value similarity to the class, L1 norm of mean value."""
    values_BHTd = attention.heads("values")
    similarity_BN = mean_attention(values_BHTd[:, :, :1], values_BHTd, attention.start, scale=1)
    mean_BNd = values_BHTd[:, :, attention.start :].float().mean(dim=1)
    norms_BN = mean_BNd.abs().sum(dim=-1)
    return torch.stack([_class_attention(attention), similarity_BN, norms_BN], dim=-1)


@dataclass(frozen=True, kw_only=True)
class AttentionSignal:
    """Where a signal comes from.

    Attributes:
        place: which layer: the deepest that makes the features, an early one, the tower's last, or
            each up to the deepest that makes the features (then stacked as the third axis).
        parts: what of its attention is used.
        compute: returns (B, N) or (B, N, *) float32.
        needs_class: whether it is defined only where there is a class token.
    """

    place: Place
    parts: frozenset[Part]
    compute: Callable[[Attention], Tensor]
    needs_class: bool


def _signal(
    place: Place, compute: Callable[[Attention], Tensor], *parts: Part, needs_class: bool = False
) -> AttentionSignal:
    return AttentionSignal(
        place=place, compute=compute, parts=frozenset(parts), needs_class=needs_class
    )


ATTENTION_SIGNALS: Mapping[str, AttentionSignal] = {
    "cls_attention": _signal("selected", _class_attention, "queries", "keys", needs_class=True),
    "received_attention": _signal("selected", _received_attention, "queries", "keys"),
    "keys": _signal("selected", _keys, "keys"),
    "mean_keys": _signal("selected", _mean_keys, "keys"),
    "attention_output": _signal("selected", _output, "output"),
    "shallow_attention": _signal("shallow", _class_or_received_attention, "queries", "keys"),
    "shallow_keys": _signal("shallow", _keys, "keys"),
    "last_cls_attention": _signal(
        "last", _joined_class_attention, "queries", "keys", needs_class=True
    ),
    "last_keys": _signal("last", _keys, "keys"),
    "cls_logits": _signal("last", _class_logits, "queries", "keys", needs_class=True),
    "attention_flow": _signal("each", _flow, "queries", "keys", "values", needs_class=True),
}
"""Every signal that the attention of a tower gives, by name."""

SHALLOW_SIGNALS = frozenset(n for n, s in ATTENTION_SIGNALS.items() if s.place == "shallow")


def map_names(
    *, output: str, queries: str = "q_proj", keys: str = "k_proj", values: str = "v_proj"
) -> Mapping[Part, str]:
    """Return the names of an attention module's linear maps, or of the norms behind them."""
    return {"queries": queries, "keys": keys, "values": values, "output": output}


def linear_maps(signals: frozenset[str], names: Mapping[Part, str]) -> Mapping[Part, str]:
    """Return the linear maps of an attention module whose results some signals are made of.

    Args:
        signals: names in `ATTENTION_SIGNALS`.
        names: of all its maps.
    """
    wanted = {part for name in signals for part in ATTENTION_SIGNALS[name].parts}
    return {part: name for part, name in names.items() if part in wanted}


class AttentionProbe:
    """Catches what one self-attention module makes while it runs.

    Args:
        attention: a module with linear maps for queries, keys and values, and no rotary embedding.
        names: of its maps; see `map_names`.
        num_heads: of the attention.
        has_class: whether the first token is a class token.
        signals: which signals of this module to compute.
    """

    def __init__(
        self,
        attention: nn.Module,
        *,
        names: Mapping[Part, str],
        num_heads: int,
        has_class: bool,
        signals: frozenset[str],
    ) -> None:
        self._num_heads = num_heads
        self._has_class = has_class
        self._signals = sorted(signals)
        self._maps = {
            part: attention.get_submodule(name)
            for part, name in linear_maps(signals, names).items()
        }
        self._caught: dict[Part, Tensor] = {}
        for part, linear in self._maps.items():
            linear.register_forward_hook(self._catch(part))

    def feed(self, inputs_BTD: Tensor) -> None:
        """Run those linear maps that are watched, in place of the whole attention."""
        for linear in self._maps.values():
            linear(inputs_BTD)

    def take(self, start: int) -> dict[str, Tensor]:
        """Return the signals of the last run for the tokens from `start` on, and forget the run."""
        parts, self._caught = self._caught, {}
        attention = Attention(
            parts=parts, num_heads=self._num_heads, start=start, has_class=self._has_class
        )
        return {name: ATTENTION_SIGNALS[name].compute(attention) for name in self._signals}

    def _catch(self, part: Part):  # type: ignore[no-untyped-def]  # noqa: ANN202
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            self._caught[part] = output

        return hook
