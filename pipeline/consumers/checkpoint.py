"""Load of a model what cached tokens need, and nothing of its vision tower.

A cache has what the tower would compute, so a process that trains or answers from one needs the
projector and the language model only. The tower is never built with memory for its weights, and
of the checkpoint only the bytes of the other tensors are read; of a hub repository only the files
that hold them are fetched.
"""

import json
from typing import Any

import torch
import transformers
from torch import nn

from pipeline.encoders._weights import Checkpoint, Source, fill, locate
from pipeline.errors import ConfigError

# How the checkpoints on the hub spell what transformers 5 calls by the names before the colon.
_OLDER = {
    "model.language_model.": "language_model.model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}
_ROW_END = "image_newline"
_ROW_END_KEYS = (f"model.{_ROW_END}", _ROW_END)
MODEL_TYPES = frozenset({"llava", "llava_next", "llava_onevision"})
"""`config.model_type` of the models that can be loaded this way."""
_PARTS = ("model.language_model", "model.multi_modal_projector", "lm_head")


class AbsentTower(nn.Module):
    """Stands where the tower was; has no weights, and says so when it is asked to encode."""

    def forward(self, *_: object, **__: object) -> None:
        """Raise ConfigError: there is nothing to encode pixels with."""
        raise ConfigError(
            "the model was loaded without its vision tower and cannot take pixel_values; give it "
            "cached tokens (consumers.hf.prepare), or load it with from_pretrained"
        )


def load_without_tower(
    model: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Any, Any]:
    """Load a model's projector and language model, and its tokenizer.

    The weights are frozen and the model is in evaluation mode. The peak of memory is these weights
    plus their largest tensor.

    Args:
        model: local directory of a checkpoint, or id of a hub repository; of `MODEL_TYPES`.
        revision: branch, tag or commit of a hub repository; None is its default branch.
        dtype: of the weights.
        device: where they go.

    Returns:
        The `...ForConditionalGeneration`, which takes what `hf.prepare` gives, and the tokenizer,
        with the processor's chat template: nothing here has pixels to process.

    Raises:
        ConfigError: the model cannot be found, is of another family, or lacks a tensor.
    """
    checkpoint = Checkpoint(model, revision)
    place = checkpoint.place if checkpoint.is_local else model
    config = _read(transformers.AutoConfig, place, checkpoint)
    if config.model_type not in MODEL_TYPES:
        known = ", ".join(sorted(MODEL_TYPES))
        raise ConfigError(
            f"model {model!r} is a {config.model_type!r}, which cannot be loaded without its tower "
            f"yet; known: {known}"
        )
    tokenizer = _read(transformers.AutoTokenizer, place, checkpoint)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _processor_template(checkpoint)
    loaded = _skeleton(config, dtype)
    _fill(loaded, checkpoint, device=device, dtype=dtype)
    if checkpoint.find("generation_config.json") is not None:
        loaded.generation_config = transformers.GenerationConfig.from_pretrained(
            place, revision=checkpoint.revision
        )
    loaded.name_or_path = place  # what an adapter says that it belongs to
    return loaded, tokenizer


def _read(kind: Any, place: str, checkpoint: Checkpoint) -> Any:  # noqa: ANN401
    try:
        return kind.from_pretrained(place, revision=checkpoint.revision)
    except (OSError, ValueError) as err:
        reason = " ".join(str(err).split())
        raise ConfigError(f"model {checkpoint.model!r} cannot be loaded: {reason}") from err


def _processor_template(checkpoint: Checkpoint) -> str | None:
    """Return the chat template where older processors keep it, which no tokenizer reads."""
    path = checkpoint.find("chat_template.json")
    if path is None:
        return None
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["chat_template"])
    except (OSError, ValueError, TypeError, KeyError) as err:
        raise ConfigError(f"{path} holds no chat_template: {err!r}; download it again") from err


def _skeleton(config: Any, dtype: torch.dtype) -> Any:  # noqa: ANN401
    """Build the model without memory for its weights, and without a tower."""
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(
            config,
            dtype=dtype,
            attn_implementation="sdpa",  # takes a mask of any shape
        )
    model.model.vision_tower = AbsentTower()
    return model


def _fill(
    model: Any,  # noqa: ANN401
    checkpoint: Checkpoint,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
) -> None:
    is_tied = model.lm_head.weight is model.get_input_embeddings().weight
    parts = [part for part in _PARTS if not (is_tied and part == "lm_head")]
    names = [
        f"{part}.{name}"
        for part in parts
        for name, _ in model.get_submodule(part).named_parameters()
    ]
    sources = locate(checkpoint, names, prefixes=("",), layouts=(Source, _older))
    for part in parts:
        of_part = {
            name.removeprefix(f"{part}."): source
            for name, source in sources.items()
            if name.startswith(f"{part}.")
        }
        fill(model.get_submodule(part), checkpoint, of_part, device=device, dtype=dtype)
    if is_tied:
        model.lm_head.weight = model.get_input_embeddings().weight
    if hasattr(model.model, _ROW_END):  # `hf.prepare` puts it behind the rows of an image
        keys = checkpoint.keys()
        stored = next((key for key in _ROW_END_KEYS if key in keys), None)
        if stored is None:
            raise ConfigError(f"model {checkpoint.model!r} lacks the tensor {_ROW_END!r}")
        end = checkpoint.read(Source(stored)).to(device=device, dtype=dtype)
        model.model.image_newline = nn.Parameter(end, requires_grad=False)
    language = model.model.language_model
    # Its frequencies are computed, not stored; on the meta device they have no values.
    language.rotary_emb = type(language.rotary_emb)(config=language.config).to(device)
    model.eval()
    empty = [name for name, tensor in _tensors(model) if tensor.is_meta]
    if empty:
        raise ConfigError(
            f"model {checkpoint.model!r} has {empty[0]!r}, which is not stored in its checkpoint "
            "and cannot be computed here; load it with from_pretrained"
        )


def _tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _older(name: str) -> Source:
    for new, old in _OLDER.items():
        if name.startswith(new):
            return Source(old + name.removeprefix(new))
    return Source(name)
