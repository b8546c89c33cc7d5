"""Fine-tune a small part of a model from cached tokens, with no vision tower in memory.

    python examples/finetune_from_cache.py --cache demo/cache --model demo/model --column json \
        --template '<image> {prompt}' --steps 200 --output tuned

trains a LoRA of the language model and, where the cache holds tokens from before the projector,
the projector. `tuned/` then has `adapter/` (peft), `projector.safetensors`, `loss.jsonl` (a line a
step) and `training.json` (what was run). One question on each image makes one sequence; the loss
counts the tokens of the answers and their end token.

P sequences of a batch, T columns of the longest, L of them the last ones, which hold all answers.
"""

import argparse
import itertools
import json
import math
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
from cached_model import (
    ADAPTER,
    PROJECTOR,
    CachedModel,
    add_model_options,
    batched,
    load_cached_model,
    run,
    without_peft_warning,
)
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from pipeline import CarvedDataset, open_cache
from pipeline.carved_cache import CachedImage, CarvedCache
from pipeline.consumers.hf import language_dtype
from pipeline.dataset import PackedRow
from pipeline.errors import ConfigError
from pipeline.evaluation.questions import ColumnQuestions, Question, Questions, read_questions
from pipeline.types import Sample

IGNORED = -100
_ROWS_READ = 64  # at once, by a process that reads ahead


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How long to train, and how fast."""

    steps: int
    learning_rate: float
    warm_up: int  # steps in which the learning rate rises; then it falls as half a cosine
    gradient_norm: float = 1.0  # larger gradients are scaled down to it


class Lesson(NamedTuple):
    """A question on a cached image, and its answer."""

    row: PackedRow
    prompt: str
    answer: str


class Sequences(NamedTuple):
    """A batch, as a model is trained on it."""

    inputs: dict[str, Any]  # of `forward`
    labels: Tensor  # (P, T) int64; IGNORED everywhere but in the answers


def read_lessons(
    cache: CarvedCache, questions: Questions, options: argparse.Namespace
) -> Iterator[Lesson]:
    """Yield lessons without end, epoch after epoch, each in an order of its own.

    Every image that has answered questions comes once an epoch, with one of them. Order and
    questions depend on the seed and the number of workers alone.

    Raises:
        ConfigError: no image of the cache has an answered question.
    """
    columns = [options.column] if options.column else []
    dataset = CarvedDataset(
        cache, batch_size=_ROWS_READ, shuffle=True, seed=options.seed, columns=columns
    )
    for epoch in itertools.count():
        dataset.set_epoch(epoch)
        loader = DataLoader(dataset, batch_size=None, num_workers=options.workers)
        is_empty = True
        for row in (row for batch in loader for row in batch):
            rng = random.Random(f"{options.seed}/{epoch}/{row.key}")
            if answered := [q for q in _asked(questions, row) if q.answer]:
                question = rng.choice(answered)
                yield Lesson(row, question.prompt, str(question.answer))
                is_empty = False
        if is_empty:
            where = f"column {options.column!r}" if options.column else options.questions
            raise ConfigError(
                f"{where} has no question with an answer for any of the {len(cache)} images of "
                f"{options.cache}; give lines of key, prompt and answer, with the cache's keys"
            )


def _asked(questions: Questions, row: PackedRow) -> Sequence[Question]:
    columns = {name: text.encode() for name, text in row.columns.items() if text is not None}
    return questions.of(Sample(key=row.key, image=b"", suffix="", columns=columns))


def write_sequences(prompts: Sequence[str], answers: Sequence[str], tokenizer: Any) -> list[str]:  # noqa: ANN401
    """Return each prompt with its answer and the end token behind it."""
    return [
        f"{prompt}{'' if prompt[-1:].isspace() else ' '}{answer}{tokenizer.eos_token}"
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def label_answers(
    input_ids: Tensor,
    prompts: Sequence[str],
    texts: Sequence[str],
    tokenizer: Any,  # noqa: ANN401
) -> Tensor:
    """Return the (P, T) labels of sequences that are padded on the left.

    Args:
        input_ids: (P, T), of the texts, with any number of image tokens in place of each one.
        prompts: what each text begins with and is not learnt.
        texts: prompts and answers.
        tokenizer: that made the ids.

    Raises:
        ConfigError: the end of a prompt and its answer are tokenized together.
    """
    labels = torch.full_like(input_ids, IGNORED)
    known, whole = (tokenizer(list(t))["input_ids"] for t in (prompts, texts))
    for row, (prompt, text) in enumerate(zip(known, whole, strict=True)):
        if text[: len(prompt)] != prompt or len(text) == len(prompt):
            raise ConfigError(
                f"the tokenizer does not keep the prompt {prompts[row]!r} apart from what follows "
                f"it in {texts[row]!r}; end the template with a word or a line break"
            )
        num_learnt = len(text) - len(prompt)
        labels[row, -num_learnt:] = input_ids[row, -num_learnt:]
    return labels


def cached_batches(
    language: CachedModel,
    cache: CarvedCache,
    lessons: Iterable[Lesson],
    options: argparse.Namespace,
) -> Iterator[Sequences]:
    """Yield batches; ragged images are padded, and the projector is run with gradients."""
    dataset = CarvedDataset(cache)
    for batch in batched(lessons, options.batch_size):
        rows = dataset.collate([lesson.row for lesson in batch])
        images: list[CachedImage] = rows.images(device=options.device)
        prompts = language.texts([lesson.prompt for lesson in batch])
        answers = [lesson.answer for lesson in batch]
        texts = write_sequences(prompts, answers, language.tokenizer)
        inputs = language.inputs(images, texts)
        labels = label_answers(inputs["input_ids"], prompts, texts, language.tokenizer)
        yield Sequences(inputs, labels)


def make_trainable(model: Any, *, stage: str, options: argparse.Namespace) -> Any:  # noqa: ANN401
    """Freeze a model, add a LoRA to its language model, and free its projector.

    Args:
        model: of `transformers`, with or without a vision tower; changed in place.
        stage: of the features it will be given; the projector is trained if they come before it.
        options: of this script.

    Returns:
        The `peft` model, or the model itself where `lora_rank` is 0.

    Raises:
        ConfigError: nothing is left to train, or no layer has one of the names.
    """
    torch.manual_seed(options.seed)
    model.requires_grad_(False)
    trained = model
    if options.lora_rank:
        names = "|".join(options.lora_layers.split(","))
        config = peft.LoraConfig(
            r=options.lora_rank,
            lora_alpha=options.lora_alpha or 2 * options.lora_rank,
            lora_dropout=options.lora_dropout,
            target_modules=rf".*language_model\..*\.({names})",
        )
        try:
            with without_peft_warning():
                trained = peft.get_peft_model(model, config)
        except ValueError as err:
            raise ConfigError(f"--lora-layers {options.lora_layers!r}: {err}") from err
    if stage == "pre_projector" and not options.freeze_projector:
        # In float32 whatever the rest is in: small steps would be lost in half precision.
        model.model.multi_modal_projector.float().requires_grad_(True)
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            f"nothing to train: the cache's stage is {stage!r}, and --lora-rank is 0; give a rank, "
            "or a cache of stage pre_projector without --freeze-projector"
        )
    return trained.train()


def train(
    model: Any,  # noqa: ANN401
    batches: Iterator[Sequences],
    plan: Plan,
) -> Iterator[tuple[float, float]]:
    """Train what is not frozen, with AdamW; yield loss and learning rate of each step.

    Args:
        model: of `make_trainable`.
        batches: without end; each is asked for when the step before it is done.
        plan: how long.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=plan.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _factor(step, plan))
    # Not the model's own: the first of its weights may be the projector's, in float32.
    device, dtype = model.device, language_dtype(model)
    for _ in range(plan.steps):
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            sequences = next(batches)
            loss = answer_loss(model, sequences)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, plan.gradient_norm)
        (rate,) = schedule.get_last_lr()
        optimizer.step()
        schedule.step()
        yield loss.item(), rate


def answer_loss(model: Any, sequences: Sequences) -> Tensor:  # noqa: ANN401
    """Return the mean loss of a token of the answers; only their columns get logits."""
    is_learnt_T = (sequences.labels != IGNORED).any(dim=0)
    num_columns = int(is_learnt_T.flip(0).nonzero().max()) + 1
    logits_PLV = model(**sequences.inputs, logits_to_keep=num_columns + 1, use_cache=False).logits
    return functional.cross_entropy(
        logits_PLV[:, :-1].flatten(0, 1).float(),
        sequences.labels[:, -num_columns:].flatten(),
        ignore_index=IGNORED,
    )


def _factor(step: int, plan: Plan) -> float:
    """Return the share of the learning rate that a step gets."""
    if step < plan.warm_up:
        return (step + 1) / (plan.warm_up + 1)
    return 0.5 + 0.5 * math.cos(math.pi * (step - plan.warm_up) / (plan.steps - plan.warm_up))


def save(folder: Path, model: Any, trained: Any) -> None:  # noqa: ANN401
    """Write what was trained: `adapter/` and `projector.safetensors`, those of them there are."""
    if trained is not model:
        trained.save_pretrained(folder / ADAPTER, save_embedding_layers=False)
    projector = model.model.multi_modal_projector
    if any(p.requires_grad for p in projector.parameters()):
        weights = {name: tensor.contiguous() for name, tensor in projector.state_dict().items()}
        save_file(weights, folder / PROJECTOR)


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_model_options(parser)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--questions", help="JSON lines of key, prompt and answer; a path or URL")
    asked.add_argument("--column", help="JSON column of the cache with a list `questions`")
    parser.add_argument("--output", type=Path, required=True, help="a new folder")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--warm-up", type=int, help="steps; default: 3 %% of them")
    parser.add_argument("--lora-rank", type=int, default=16, help="0 for none; default: 16")
    parser.add_argument("--lora-alpha", type=int, help="default: twice the rank")
    parser.add_argument("--lora-dropout", type=float, default=0.0)
    parser.add_argument(
        "--lora-layers",
        default="q_proj,k_proj,v_proj,o_proj",
        help="of the language model, by the end of their names; default: %(default)s",
    )
    parser.add_argument("--freeze-projector", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="processes that read ahead")
    parser.add_argument("--log-every", type=int, default=10, help="steps; default: 10")
    options = parser.parse_args(arguments)
    for name in ("batch_size", "steps", "log_every"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.dtype == "float16":
        parser.error("--dtype float16 is for answering: gradients overflow it; train in bfloat16")
    if options.warm_up is None:
        options.warm_up = round(0.03 * options.steps)
    if not 0 <= options.warm_up < options.steps:
        parser.error(f"--warm-up must be in [0, {options.steps}), the number of steps")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Train from a cache and save the result."""
    options = parse_options(arguments)
    if options.output.exists() and any(options.output.iterdir()):
        raise ConfigError(f"{options.output} is not empty; choose a new --output")
    options.output.mkdir(parents=True, exist_ok=True)
    cache = open_cache(options.cache, keep_tokens=options.keep_tokens)
    language = load_cached_model(cache, options)
    questions = (
        ColumnQuestions(column=options.column)
        if options.column
        else read_questions(options.questions)
    )
    trained = make_trainable(language.model, stage=language.stage, options=options)
    plan = Plan(steps=options.steps, learning_rate=options.learning_rate, warm_up=options.warm_up)
    lessons = read_lessons(cache, questions, options)
    batches = cached_batches(language, cache, lessons, options)
    count = sum(p.numel() for p in trained.parameters() if p.requires_grad)
    print(f"training {count:,} parameters of {options.model} on {len(cache):,} images")
    losses = _log(train(trained, batches, plan), options)
    save(options.output, language.model, trained)
    about = {
        "options": vars(options),
        "plan": asdict(plan),
        "stage": language.stage,
        "trained_parameters": count,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
    }
    (options.output / "training.json").write_text(json.dumps(about, indent=1, default=str) + "\n")
    print(f"saved in {options.output}")


def _log(steps: Iterable[tuple[float, float]], options: argparse.Namespace) -> list[float]:
    """Write a line for each step, print some, and return the losses."""
    losses: list[float] = []
    start = time.monotonic()
    with (options.output / "loss.jsonl").open("w") as log:
        for number, (loss, rate) in enumerate(steps, start=1):
            losses.append(loss)
            seconds = time.monotonic() - start
            line = {"step": number, "loss": loss, "learning_rate": rate, "seconds": seconds}
            log.write(json.dumps(line) + "\n")
            if number % options.log_every == 0 or number == options.steps:
                log.flush()
                recent = losses[-options.log_every :]
                mean = sum(recent) / len(recent)
                speed = number * options.batch_size / seconds
                print(f"step {number}: loss {mean:.4f}, {speed:.1f} images/s", flush=True)
    return losses


if __name__ == "__main__":
    run(main)
