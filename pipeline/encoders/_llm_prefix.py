"""The first decoder layers of a language model under a fixed prompt, for text-side signals.

No question is known when an image is carved, so the prompt is fixed, and what it gives is
question-free: for an image that stands before the question in the prompt, its hidden states depend
on nothing behind it, and the attention of the last prompt token is that of a neutral request.
"""

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from pipeline.encoders._signals import mean_attention, split_heads
from pipeline.encoders._weights import Checkpoint, Source, fill, locate
from pipeline.errors import ConfigError

# Models that compute queries and keys as Llama does: linear maps, then rotary embedding.
_MODELS = {"llama": "LlamaModel", "mistral": "MistralModel", "qwen2": "Qwen2Model"}
LLM_SIGNALS = frozenset({"llm_hidden", "llm_attention"})
_PREFIXES = ("model.language_model.", "language_model.model.", "language_model.")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def llm_signals(config: Any, num_layers: int) -> frozenset[str]:  # noqa: ANN401
    """Return the signals that the first `num_layers` layers of a language model can give.

    Raises:
        ConfigError: it has fewer layers.
    """
    if num_layers > config.num_hidden_layers:
        raise ConfigError(
            f"option 'llm_layers' is {num_layers}, the language model has "
            f"{config.num_hidden_layers}; ask for at most that many"
        )
    return LLM_SIGNALS if config.model_type in _MODELS else frozenset()


def tokenize_prompt(checkpoint: Checkpoint, prompt: str, image_id: int) -> tuple[list[int], int]:
    """Tokenize a prompt as the model's processor does, with one id for the image.

    Returns:
        The ids without the image, and the number of them before it.

    Raises:
        ConfigError: no tokenizer, or the prompt does not hold the image exactly once and text
            behind it.
    """
    paths = [checkpoint.find(name) for name in _TOKENIZER_FILES]
    if paths[0] is None:
        raise ConfigError(
            f"model {checkpoint.model!r} has no tokenizer.json; llm signals need it: save the "
            "processor beside the model"
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(paths[0].parent), trust_remote_code=False
        )
    except (OSError, ValueError) as err:
        reason = " ".join(str(err).split())
        raise ConfigError(f"tokenizer of model {checkpoint.model!r}: {reason}") from err
    ids = [int(token) for token in tokenizer(prompt)["input_ids"]]
    if ids.count(image_id) != 1 or ids[-1] == image_id:
        raise ConfigError(
            f"option 'prompt' {prompt!r} must hold the image token (id {image_id}) once, with text "
            "behind it"
        )
    before = ids.index(image_id)
    return ids[:before] + ids[before + 1 :], before


class LlmPrefix:
    """The first K decoder layers of a language model, run on projected tokens under a prompt.

    Args:
        config: of the language model, a transformers config.
        num_layers: K.
        checkpoint: where the weights and the tokenizer are.
        prompt: ids of the prompt without the image, and how many of them stand before it.
        device: where it runs.
        dtype: of its weights.

    Raises:
        ConfigError: a needed tensor is missing or does not fit.
    """

    def __init__(
        self,
        config: Any,  # noqa: ANN401
        checkpoint: Checkpoint,
        *,
        num_layers: int,
        prompt: tuple[Sequence[int], int],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        model = _skeleton(config, num_layers)
        config = model.config
        fill(model, checkpoint, _sources(model, checkpoint), device=device, dtype=dtype)
        # Its frequencies are computed, not stored; on the meta device they have no values.
        model.rotary_emb = type(model.rotary_emb)(config=config).to(device)
        self._model = model
        ids, self._num_before = prompt
        rows = checkpoint.read_rows(_embeddings(checkpoint), ids)
        self._prompt_PD = rows.to(device=device, dtype=dtype)
        self._caught: dict[str, Tensor] = {}
        self._attention = model.layers[-1].self_attn
        # Qwen 2 sets it per layer, Mistral for all, Llama not at all.
        of_model = getattr(config, "sliding_window", None)
        self._window = getattr(self._attention, "sliding_window", of_model)

    def __call__(self, projected_BND: Tensor, signals: frozenset[str]) -> dict[str, Tensor]:
        """Return `llm_hidden` and `llm_attention`, those of them that are asked for.

        Args:
            projected_BND: what the language model is fed for each image.
            signals: names of signals; others than these two are ignored.

        Returns:
            `llm_hidden` (B, N, D), the image's rows of the K-th layer's output, and
            `llm_attention` (B, N), what the last prompt token pays them in that layer, mean over
            heads; both float32.
        """
        before, count = self._num_before, projected_BND.shape[1]
        prompt_BPD = self._prompt_PD.expand(len(projected_BND), -1, -1)
        inputs_BTD = torch.cat(
            [prompt_BPD[:, :before], projected_BND, prompt_BPD[:, before:]], dim=1
        )
        asks_attention = "llm_attention" in signals
        handles = [
            self._attention.get_submodule(name).register_forward_hook(self._catch(name))
            for name in ("q_proj", "k_proj")
            if asks_attention
        ]
        output_BTD = self._model(inputs_embeds=inputs_BTD, use_cache=False).last_hidden_state
        for handle in handles:
            handle.remove()
        result = {}
        if "llm_hidden" in signals:
            hidden_BND = output_BTD[:, before : before + count]
            result["llm_hidden"] = hidden_BND.float().contiguous()
        if asks_attention:
            result["llm_attention"] = self._last_attention(inputs_BTD)[:, before : before + count]
        return result

    def _last_attention(self, inputs_BTD: Tensor) -> Tensor:
        """Return the (B, T) attention of the last token, which sees all others."""
        caught, self._caught = self._caught, {}
        head_width = self._attention.head_dim
        queries_BHTd, keys_BhTd = (
            split_heads(caught[name].float(), head_width) for name in ("q_proj", "k_proj")
        )
        positions = torch.arange(inputs_BTD.shape[1], device=inputs_BTD.device)[None]
        cos, sin = self._model.rotary_emb(inputs_BTD.float(), position_ids=positions)
        queries_BHTd = _rotate(queries_BHTd[:, :, -1:], cos[:, -1:], sin[:, -1:])
        keys_BhTd = _rotate(keys_BhTd, cos, sin)
        repeats = queries_BHTd.shape[1] // keys_BhTd.shape[1]
        keys_BHTd = keys_BhTd.repeat_interleave(repeats, dim=1)
        first = max(0, keys_BHTd.shape[2] - (self._window or keys_BHTd.shape[2]))
        seen = mean_attention(queries_BHTd, keys_BHTd[:, :, first:], 0)
        return nn.functional.pad(seen, (first, 0))

    def _catch(self, name: str):  # type: ignore[no-untyped-def]  # noqa: ANN202
        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> None:
            self._caught[name] = output

        return hook


def llm_reads(
    config: Any,  # noqa: ANN401
    checkpoint: Checkpoint,
    *,
    num_layers: int,
    ids: Sequence[int],
) -> tuple[frozenset[str], dict[str, Sequence[int]]]:
    """Return the stored tensors that a `LlmPrefix` reads, and those of which it reads only rows.

    Raises:
        ConfigError: one is missing.
    """
    sources = _sources(_skeleton(config, num_layers), checkpoint)
    return frozenset(source.key for source in sources.values()), {_embeddings(checkpoint): ids}


def _skeleton(config: Any, num_layers: int) -> Any:  # noqa: ANN401
    """Build the layers that run, without memory for their weights."""
    config = type(config).from_dict(_cut(config.to_dict(), num_layers))
    with torch.device("meta"):
        model = getattr(transformers, _MODELS[config.model_type])(config)
    model.embed_tokens = None  # of the vocabulary only the prompt's few rows are read
    model.norm = nn.Identity()  # the K-th layer's output is wanted, not the model's
    return model


def _sources(model: nn.Module, checkpoint: Checkpoint) -> dict[str, Source]:
    names = [name for name, _ in model.named_parameters()]
    return locate(checkpoint, names, prefixes=_PREFIXES)


def _embeddings(checkpoint: Checkpoint) -> str:
    name = "embed_tokens.weight"
    return locate(checkpoint, [name], prefixes=_PREFIXES)[name].key


def _cut(settings: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Return the settings of a language model's first layers."""
    settings["num_hidden_layers"] = num_layers
    if settings.get("layer_types"):
        settings["layer_types"] = settings["layer_types"][:num_layers]
    return settings


def _rotate(values_BHTd: Tensor, cos_1Td: Tensor, sin_1Td: Tensor) -> Tensor:
    """Apply the rotary embedding in the half-split form Llama checkpoints are stored for."""
    first, second = values_BHTd.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return values_BHTd * cos_1Td[:, None] + turned * sin_1Td[:, None]
