"""What the attention of one tower layer says about its tokens.

Fused attention never shows its weights. Queries and keys are therefore caught where they are made,
and only the sums that a signal needs are computed from them, in float32; the layer itself keeps
its fast path.
"""

import torch
from torch import Tensor, nn

# Elements of the largest block of attention weights held at once: 64 MiB.
_MAX_WEIGHTS = 2**24


class AttentionProbe:
    """Catches queries, keys and output of one self-attention module while it runs.

    Args:
        attention: a module with linear maps `q_proj` and `k_proj` and no rotary embedding.
        output: name of its last linear map.
        num_heads: of the attention.
        signals: which of the attention signals to compute.
    """

    def __init__(
        self, attention: nn.Module, *, output: str, num_heads: int, signals: frozenset[str]
    ) -> None:
        self._num_heads = num_heads
        self._signals = signals
        self._caught: dict[str, Tensor] = {}
        weighs = bool(signals & {"cls_attention", "received_attention"})
        wanted = {
            "q_proj": weighs,
            "k_proj": weighs or "keys" in signals,
            output: "attention_output" in signals,
        }
        self._output = output
        for name in (name for name, is_wanted in wanted.items() if is_wanted):
            attention.get_submodule(name).register_forward_hook(self._catch(name))

    def take(self, start: int) -> dict[str, Tensor]:
        """Return the signals of the last run for the tokens from `start` on, and forget the run."""
        caught, self._caught = self._caught, {}
        result = {}
        if "keys" in self._signals:
            result["keys"] = _rows(caught["k_proj"], start)
        if "attention_output" in self._signals:
            result["attention_output"] = _rows(caught[self._output], start)
        if "cls_attention" in self._signals:
            queries_BHTd, keys_BHTd = self._split(caught)
            result["cls_attention"] = mean_attention(queries_BHTd[:, :, :1], keys_BHTd, start)
        if "received_attention" in self._signals:
            queries_BHTd, keys_BHTd = self._split(caught)
            result["received_attention"] = mean_attention(
                queries_BHTd[:, :, start:], keys_BHTd, start
            )
        return result

    def _split(self, caught: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        queries, keys = (
            split_heads(caught[name], caught[name].shape[-1] // self._num_heads)
            for name in ("q_proj", "k_proj")
        )
        return queries, keys

    def _catch(self, name: str):  # type: ignore[no-untyped-def]  # noqa: ANN202
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            self._caught[name] = output

        return hook


def split_heads(values_BTD: Tensor, head_width: int) -> Tensor:
    """Return (B, T, H * d) values as (B, H, T, d)."""
    return values_BTD.view(*values_BTD.shape[:-1], -1, head_width).transpose(1, 2)


def mean_attention(queries_BHQd: Tensor, keys_BHTd: Tensor, start: int) -> Tensor:
    """Return the attention each token from `start` on receives, mean over queries and heads.

    The softmax runs over all T keys; weights of the tokens before `start` are dropped without
    renormalising.

    Args:
        queries_BHQd: (B, H, Q, d), any float dtype.
        keys_BHTd: (B, H, T, d), any float dtype.
        start: first token wanted.

    Returns:
        (B, T - start) float32 in [0, 1].
    """
    num_images, num_heads, num_queries, head_width = queries_BHQd.shape
    per_image = num_heads * num_queries * keys_BHTd.shape[2]
    step = max(1, _MAX_WEIGHTS // per_image)
    blocks = []
    for first in range(0, num_images, step):
        queries = queries_BHQd[first : first + step].float() * head_width**-0.5
        keys = keys_BHTd[first : first + step].float()
        weights_bHQT = torch.softmax(queries @ keys.transpose(-1, -2), dim=-1)
        blocks.append(weights_bHQT.mean(dim=(1, 2))[:, start:])
    return torch.cat(blocks)


def _rows(values_BTD: Tensor, start: int) -> Tensor:
    return values_BTD[:, start:].float().contiguous()
