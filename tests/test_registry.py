"""Plug-ins are found by file name and built from plain values."""

import subprocess
import sys

import pytest

from pipeline import carvers, codecs, encoders
from pipeline.errors import ConfigError


def test_names_are_the_file_names() -> None:
    assert {"identity", "tokencarve", "uniform_grid"} <= set(carvers.names())
    assert {"fp32", "bf16", "fp16", "int8"} <= set(codecs.names())
    assert {"llava", "vit"} <= set(encoders.names())


def test_listing_names_imports_no_plugin() -> None:
    code = (
        "import sys; from pipeline import carvers; carvers.names(); "
        "assert 'pipeline.carvers.tokencarve' not in sys.modules"
    )

    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_gets_the_nearest_known_one() -> None:
    with pytest.raises(
        ConfigError, match="no carver named 'tokencrave'; did you mean 'tokencarve'"
    ):
        carvers.build("tokencrave")


def test_an_unknown_option_gets_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match="no option 'keep_token'; did you mean 'keep_tokens'"):
        carvers.build("uniform_grid", {"keep_token": 3})


@pytest.mark.parametrize("value", ["3", 2.5, True, [3]])
def test_an_option_of_the_wrong_type_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match="keep_tokens"):
        carvers.build("uniform_grid", {"keep_tokens": value})


def test_a_private_module_is_not_a_plugin() -> None:
    with pytest.raises(ConfigError, match="no carver named '_base'"):
        carvers.build("_base")
