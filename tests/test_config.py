"""One YAML file is one run, checked whole."""

from pathlib import Path

import pytest
import yaml

from pipeline.config import load_config, parse_config
from pipeline.errors import ConfigError

GOOD = {
    "input": {"shards": "in/*.tar"},
    "output": {"url": "out"},
    "encoder": {"name": "llava", "options": {"model": "m"}},
    "carver": {"name": "tokencarve", "options": {"keep_tokens": 64}},
}


def write(tmp_path: Path, values: object) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_complete_file_gives_a_config_with_every_default_filled_in(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, GOOD))

    assert config.carver.options == {"keep_tokens": 64}
    assert config.codec.name == "int8"
    assert config.runner.max_attempts == 3


def test_every_mistake_is_named_at_once_with_the_nearest_known_key(tmp_path: Path) -> None:
    bad = {**GOOD, "runer": {}, "runner": {"batch_sze": 3, "num_actors": 0, "dtype": "int4"}}

    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, bad))

    message = str(caught.value)
    assert "runer: unknown key; did you mean 'runner'?" in message
    assert "runner.batch_sze: unknown key; did you mean 'batch_size'?" in message
    assert "runner.num_actors" in message
    assert "runner.dtype" in message
    assert "\n" not in message


def test_a_misspelt_key_of_a_plugin_is_named(tmp_path: Path) -> None:
    bad = {**GOOD, "carver": {"name": "tokencarve", "optoins": {}}}

    with pytest.raises(ConfigError, match=r"carver\.optoins: unknown key; did you mean 'options'"):
        load_config(write(tmp_path, bad))


def test_command_line_values_replace_those_of_the_file(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, GOOD),
        input_shards="other",
        output_url="there",
        overrides=["carver.options.keep_tokens=8", "runner.batch_size=2", "codec={name: bf16}"],
    )

    assert config.input.shards == "other"
    assert config.output.url == "there"
    assert config.carver.options == {"keep_tokens": 8}
    assert config.runner.batch_size == 2
    assert config.codec.name == "bf16"


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("no-equals-sign", "must be dotted.key=value"),
        ("carver.name.x=1", "'name' is not a mapping"),
        ("runner.batch_size=[", "the value is not YAML"),
        ("runner.batch_size=many", "runner.batch_size"),
    ],
)
def test_a_bad_override_is_refused(tmp_path: Path, override: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_config(write(tmp_path, GOOD), overrides=[override])


def test_input_and_output_must_be_given_somewhere(tmp_path: Path) -> None:
    values = {key: GOOD[key] for key in ("encoder", "carver")}

    with pytest.raises(ConfigError, match=r"input.shards.*--input.*output.url.*--output"):
        load_config(write(tmp_path, values))


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"a: [", "not YAML"), (b"- 1", "must hold a mapping"), (b"\xff\xfe\xfa", "not YAML")],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)

    with pytest.raises(ConfigError, match=problem):
        load_config(path)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"cannot read config nowhere\.yaml"):
        load_config("nowhere.yaml")


def test_numbers_are_not_taken_from_strings() -> None:
    with pytest.raises(ConfigError, match=r"runner\.batch_size"):
        parse_config({**GOOD, "runner": {"batch_size": "32"}})
