"""README says what is true: its tables are the plug-ins', its example works."""

import re

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


def section(name: str) -> str:
    found = re.search(rf"<!-- {name}\b[^\n]*-->\n(.*?)<!-- end -->", README, re.DOTALL)
    assert found, f"README has no section {name}"
    return found[1].strip()


@pytest.mark.parametrize("kind", ["carvers", "codecs", "encoders"])
def test_the_tables_are_what_the_command_prints(kind: str) -> None:
    printed = CliRunner().invoke(app, ["list", kind])

    assert printed.exit_code == 0, printed.output
    assert section(kind) == printed.stdout.strip()


def test_the_two_commands_stand_first() -> None:
    first_block = README.split("```")[1].strip().splitlines()

    assert first_block == [
        "pip install -c constraints.txt -e . && carve demo",
        "pip install -c constraints.txt -e '.[test]' && pytest",
    ]


def test_the_example_carver_works_as_written() -> None:
    import torch

    from pipeline.types import VisualTokens

    code = README.split("## Add a carver")[1].split("```python")[1].split("```")[0]
    namespace: dict = {"__name__": "key_norm"}
    exec(code, namespace)
    keys = torch.tensor([[[1.0], [3.0], [2.0], [0.5]]])
    tokens = VisualTokens(features=torch.eye(4)[None], grid=(2, 2), signals={"keys": keys})

    (kept,) = namespace["KeyNorm"](keep_tokens=2).carve(tokens)

    assert kept.positions.tolist() == [1, 2]
