"""What is asked of each image, and which answer is right where one is given."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.errors import ConfigError, SampleError
from pipeline.storage import read_input
from pipeline.types import Sample

PLAIN_TEMPLATE = "USER: <image>\n{prompt} ASSISTANT:"
"""LLaVA-1.5's, for checkpoints without a chat template."""

_FIELDS = frozenset({"key", "prompt", "answer", "family"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """One question on one image."""

    prompt: str
    answer: str | None = None  # None where no answer is known
    family: str = ""


class Questions(Protocol):
    """Where the questions of a sample come from."""

    def of(self, sample: Sample) -> Sequence[Question]:
        """Return the questions on one image, in order; empty if there are none.

        Raises:
            SampleError: they cannot be read.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class SamePrompts:
    """The same questions on every image, without answers."""

    prompts: Sequence[str]

    def of(self, sample: Sample) -> Sequence[Question]:
        """Return the questions; see `Questions`."""
        del sample
        return [Question(prompt=prompt) for prompt in self.prompts]


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedQuestions:
    """Questions by the image's key. Made by `read_questions`."""

    by_key: Mapping[str, Sequence[Question]]

    def of(self, sample: Sample) -> Sequence[Question]:
        """Return the questions on one image; see `Questions`."""
        return self.by_key.get(sample.key, ())


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnQuestions:
    """Questions in a JSON member of each sample, in the field `questions`."""

    column: str

    def of(self, sample: Sample) -> Sequence[Question]:
        """Return the questions on one image; none where member or field are absent."""
        raw = sample.columns.get(self.column)
        if raw is None:
            return ()
        where = f"{sample.key}: member .{self.column}"
        try:
            content = json.loads(raw)
            if not isinstance(content, dict):
                raise ConfigError(f"{where}: holds {type(content).__name__}, expected an object")
            rows = content.get("questions", [])
            if not isinstance(rows, list):
                raise ConfigError(f"{where}: questions is {rows!r}, expected a list")
            return [_question(row, where) for row in rows]
        except (ValueError, RecursionError) as err:
            message = str(err) if isinstance(err, ConfigError) else f"{where}: not JSON: {err}"
            raise SampleError(message, key=sample.key, reason="bad_questions") from err


def read_questions(url: str) -> ListedQuestions:
    """Read JSON lines of {"key", "prompt", "answer"?, "family"?}.

    Args:
        url: of the file; empty lines are skipped.

    Raises:
        ConfigError: the file holds no question, or a line is wrong; the first is named.
        StorageError: it cannot be read.
    """
    found: dict[str, list[Question]] = {}
    for place, row in _rows(url):
        key = row.get("key")
        if not isinstance(key, str) or not key:
            raise ConfigError(f"{place}: key is {key!r}, expected the key of an image")
        found.setdefault(key, []).append(_question(row, place))
    if not found:
        raise ConfigError(f"{url}: holds no question")
    return ListedQuestions(by_key=found)


def fill_template(template: str, prompts: Sequence[str], image_token: str) -> list[str]:
    """Return the texts a model is given.

    Args:
        template: holds `{prompt}`, and `<image>` or the model's own image token once.
        prompts: of the questions.
        image_token: of the model, takes the place of `<image>`.

    Raises:
        ConfigError: the template does not hold exactly one image.
    """
    template = template.replace("<image>", image_token)
    if template.count(image_token) != 1 or "{prompt}" not in template:
        raise ConfigError(
            f"evaluation.template {template!r} must hold {image_token} once, and {{prompt}}"
        )
    return [template.replace("{prompt}", prompt) for prompt in prompts]


def is_right(answer: str, expected: str) -> bool:
    """Return whether two answers are the same but for case, white space and a final full stop."""
    return _plain(answer) == _plain(expected)


def _plain(text: str) -> str:
    return "".join(text.casefold().split()).removesuffix(".")


def _rows(url: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        lines = read_input(url).decode("utf-8").splitlines()
    except UnicodeDecodeError as err:
        raise ConfigError(f"{url}: not UTF-8 text at byte {err.start}") from err
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{url} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as err:
            raise ConfigError(f"{place}: not JSON: {err}") from err
        if not isinstance(row, dict):
            raise ConfigError(f"{place}: holds {type(row).__name__}, expected an object")
        if unknown := sorted(row.keys() - _FIELDS):
            known = ", ".join(sorted(_FIELDS))
            raise ConfigError(f"{place}: unknown field {unknown[0]!r}; known: {known}")
        yield place, row


def _question(row: object, where: str) -> Question:
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: a question is {row!r}, expected an object with `prompt`")
    prompt, answer, family = row.get("prompt"), row.get("answer"), row.get("family", "")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ConfigError(f"{where}: prompt is {prompt!r}, expected a text")
    if answer is not None and not isinstance(answer, str):
        raise ConfigError(f"{where}: answer is {answer!r}, expected a text")
    if not isinstance(family, str):
        raise ConfigError(f"{where}: family is {family!r}, expected a text")
    return Question(prompt=prompt, answer=answer, family=family)
