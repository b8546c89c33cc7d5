"""A model for a cache: without its vision tower, with what was trained of it, and its prompts."""

import argparse
import itertools
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch
from safetensors.torch import load_file

from pipeline.carved_cache import CachedImage, CarvedCache
from pipeline.consumers.checkpoint import load_without_tower
from pipeline.consumers.hf import STAGES, prepare, weighted_generate
from pipeline.errors import ConfigError, PipelineError
from pipeline.evaluation.answers import own_template
from pipeline.evaluation.questions import fill_template
from pipeline.types import Placement

T = TypeVar("T")

ADAPTER = "adapter"
PROJECTOR = "projector.safetensors"
"""What `finetune_from_cache.py` writes into its folder: one of them, or both."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What the model said."""

    text: str
    num_tokens: int  # that it generated, the end token among them


@dataclass(frozen=True, kw_only=True)
class CachedModel:
    """A model with its tokenizer, for the images of one cache. Made by `load_cached_model`."""

    model: Any
    tokenizer: Any
    stage: str  # of the cache's features
    template: str  # of a prompt; holds the image token and `{prompt}`
    placement: Placement

    def texts(self, prompts: Sequence[str]) -> list[str]:
        """Return what the model is given for each prompt on one image."""
        return fill_template(self.template, prompts, _image_token(self.model, self.tokenizer))

    def inputs(self, images: Sequence[CachedImage], texts: Sequence[str]) -> dict[str, Any]:
        """Return the inputs of `forward` and `generate` for texts with one image each."""
        return prepare(
            self.model, self.tokenizer, texts, images, stage=self.stage, placement=self.placement
        )

    @torch.inference_mode()
    def answer(
        self, images: Sequence[CachedImage], prompts: Sequence[str], **options: object
    ) -> list[Answer]:
        """Answer one prompt on each image, all in one batch.

        Args:
            images: of a cache.
            prompts: as many.
            options: of `generate`, such as `max_new_tokens`.
        """
        inputs = self.inputs(images, self.texts(prompts))
        output = weighted_generate(self.model, inputs, **options)
        rows = output[:, inputs["input_ids"].shape[1] :].tolist()
        ends = self.model.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else ends
        said = [row[: _length(row, ends)] for row in rows]
        texts = self.tokenizer.batch_decode(said, skip_special_tokens=True)
        return [
            Answer(text=text.strip(), num_tokens=len(row))
            for text, row in zip(texts, said, strict=True)
        ]


def _length(row: Sequence[int], ends: Sequence[int]) -> int:
    """Return how many tokens there are up to the first end, it among them; padding follows it."""
    return next((place + 1 for place, token in enumerate(row) if token in ends), len(row))


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `load_cached_model` takes, and the cache's."""
    parser.add_argument("--cache", required=True, help="URL of the cache")
    parser.add_argument("--model", required=True, help="directory, or id of a hub repository")
    parser.add_argument("--revision", help="of a hub repository")
    parser.add_argument(
        "--keep-tokens", type=int, help="at most so many tokens an image, the most important"
    )
    parser.add_argument(
        "--template",
        help="of a prompt, with <image> and {prompt}; default: the model's own chat template",
    )
    parser.add_argument(
        "--placement",
        choices=get_args(Placement),
        default="weighted",
        help="of the kept tokens (docs/evaluation.md); default: weighted",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--batch-size", type=int, default=16, help="images; default: 16")


def load_cached_model(
    cache: CarvedCache, options: argparse.Namespace, *, trained: Path | None = None
) -> CachedModel:
    """Load the model that the options name, without its vision tower.

    Args:
        cache: whose images it will be given.
        options: of `add_model_options`.
        trained: folder that `finetune_from_cache.py` wrote.

    Raises:
        ConfigError: the model cannot be loaded, cannot take the cache's features, or the folder
            holds nothing trained.
    """
    encoder = cache.identity["settings"]["encoder"]
    stage = encoder.get("stage")
    if stage not in STAGES:
        raise ConfigError(
            f"the cache was made by encoder {encoder['name']!r} with stage {stage!r}, which no "
            f"language model can be given; carve it with stage {' or '.join(STAGES)}"
        )
    model, tokenizer = load_without_tower(
        options.model,
        revision=options.revision,
        dtype=getattr(torch, options.dtype),
        device=options.device,
    )
    if trained is not None:
        model = _with_trained(model, trained)
    template = options.template
    if not template:
        template = own_template(tokenizer, tokenizer, _image_token(model, tokenizer))
    return CachedModel(
        model=model,
        tokenizer=tokenizer,
        stage=stage,
        template=template,
        placement=options.placement,
    )


def _image_token(model: Any, tokenizer: Any) -> str:  # noqa: ANN401
    return str(tokenizer.convert_ids_to_tokens(int(model.config.image_token_id)))


def _with_trained(model: Any, folder: Path) -> Any:  # noqa: ANN401
    """Return the model with a trained projector, and a trained adapter merged into its weights."""
    adapter, projector = folder / ADAPTER, folder / PROJECTOR
    if not adapter.is_dir() and not projector.is_file():
        raise ConfigError(
            f"{folder} has neither {ADAPTER}/ nor {PROJECTOR}; give the --output folder of "
            "finetune_from_cache.py"
        )
    if projector.is_file():
        weights = {name: tensor.to(model.dtype) for name, tensor in load_file(projector).items()}
        model.model.multi_modal_projector.load_state_dict(weights, strict=True)
    if adapter.is_dir():
        from peft import PeftModel

        with without_peft_warning():
            model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return model.eval()


@contextmanager
def without_peft_warning() -> Iterator[None]:
    """Leave out that peft 0.21 asks transformers 5.23 for an attribute by its older name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the items, `size` at a time and the rest."""
    rest = iter(items)
    while batch := list(itertools.islice(rest, size)):
        yield batch


def run(main: Callable[[], None]) -> None:
    """Run a script; an error of this project is one line, and exit code 2."""
    try:
        main()
    except PipelineError as err:
        print(f"error: {err}", file=sys.stderr)
        sys.exit(2)
