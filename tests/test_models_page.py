"""`docs/models.md` has every encoder, and the versions that are installed here."""

import re

import torch
import transformers

from pipeline import encoders
from pipeline.consumers.hf import MODEL_TYPES
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "models.md").read_text()


def test_every_encoder_has_a_row_and_every_row_an_encoder() -> None:
    table = PAGE.split("<!-- families: begin -->")[1].split("<!-- families: end -->")[0]
    named = set(re.findall(r"^\| [^|]+ \| `(\w+)` \|", table, re.MULTILINE))

    assert named == set(encoders.names())


def test_its_versions_are_those_that_are_tested() -> None:
    assert f"transformers {transformers.__version__}, torch {torch.__version__}" in PAGE


def test_it_says_of_every_family_what_its_language_model_takes() -> None:
    table = PAGE.split("## Who takes what")[1].lower().replace("-", "").replace(" ", "")
    for kind in MODEL_TYPES:
        name = {"qwen2_5_vl": "qwen2.5vl", "llava": "llava1.5"}.get(kind, kind.replace("_", ""))
        assert name in table, kind
