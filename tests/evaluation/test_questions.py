"""Questions from a file, from a column and from fixed prompts; templates; right answers."""

import json
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, SampleError
from pipeline.evaluation.questions import (
    ColumnQuestions,
    Question,
    SamePrompts,
    fill_template,
    is_right,
    read_questions,
)
from pipeline.types import Sample


def sample(key: str = "a", **columns: bytes) -> Sample:
    return Sample(key=key, image=b"", suffix="jpg", columns=columns)


def test_a_file_lists_questions_by_key_in_order(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(
        '{"key": "a", "prompt": "first ?", "answer": "yes", "family": "f"}\n\n'
        '{"key": "b", "prompt": "other ?"}\n{"key": "a", "prompt": "second ?", "answer": null}\n'
    )

    questions = read_questions(str(tmp_path / "q.jsonl"))

    assert questions.of(sample("a")) == [
        Question(prompt="first ?", answer="yes", family="f"),
        Question(prompt="second ?"),
    ]
    assert len(questions.of(sample("c"))) == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ("[]", "line 1: holds list"),
        ('{"prompt": "x"}', "line 1: key is None"),
        ('{"key": "a"}', "line 1: prompt is None"),
        ('{"key": "a", "prompt": "x", "answer": 3}', "line 1: answer is 3"),
        ('{"key": "a", "prompt": "x", "familly": ""}', "unknown field 'familly'"),
        ("", "holds no question"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "q.jsonl").write_text(line)

    with pytest.raises(ConfigError, match=message):
        read_questions(str(tmp_path / "q.jsonl"))


def test_a_column_lists_questions_and_a_sample_without_it_has_none() -> None:
    asked = {"questions": [{"prompt": "how many ?", "answer": "3", "family": "count", "more": 1}]}

    questions = ColumnQuestions(column="json")

    assert questions.of(sample(json=json.dumps(asked).encode())) == [
        Question(prompt="how many ?", answer="3", family="count")
    ]
    assert len(questions.of(sample())) == 0


def test_an_object_without_questions_has_none() -> None:
    questions = ColumnQuestions(column="json")

    assert len(questions.of(sample(json=b'{"caption": "a cat"}'))) == 0


@pytest.mark.parametrize(
    "content", [b"{", b'{"questions": 3}', b'{"questions": [{}]}', b"\xff", b"3"]
)
def test_a_damaged_column_costs_its_sample(content: bytes) -> None:
    with pytest.raises(SampleError) as caught:
        ColumnQuestions(column="json").of(sample("k", json=content))

    assert (caught.value.key, caught.value.reason) == ("k", "bad_questions")


def test_fixed_prompts_are_asked_of_every_image() -> None:
    assert SamePrompts(prompts=("what ?",)).of(sample("z")) == [Question(prompt="what ?")]


def test_a_template_takes_the_models_image_token_and_any_prompt() -> None:
    texts = fill_template("A <image> {prompt} B", ["{x} %s ?", "y"], "<|img|>")

    assert texts == ["A <|img|> {x} %s ? B", "A <|img|> y B"]


@pytest.mark.parametrize("template", ["{prompt}", "<image>", "<image> <image> {prompt}"])
def test_a_template_without_one_image_and_a_prompt_is_refused(template: str) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.template"):
        fill_template(template, ["x"], "<image>")


def test_answers_are_compared_without_case_space_and_full_stop() -> None:
    assert is_right(" Two  dogs.", "two dogs")
    assert is_right("A 7 K", "A7K")
    assert not is_right("two dog", "two dogs")
    assert not is_right("", "two")
