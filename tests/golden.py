"""Stored inputs and outputs of released code, to test against. See tests/data/golden."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

_FOLDER = Path(__file__).parent / "data" / "golden"


@dataclass(frozen=True, kw_only=True)
class GoldenCase:
    """One run of a released function on stored inputs."""

    name: str
    options: dict[str, Any]
    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]
    tolerance: dict[str, Any]  # tensor name without `expected.` -> "exact", or rtol and atol


def golden_cases(method: str) -> list[GoldenCase]:
    """Return the cases of one folder of tests/data/golden that has `input.`/`expected.` names."""
    folder = _FOLDER / method
    cases = json.loads((folder / "cases.json").read_text())["cases"]
    return [_load(folder, case) for case in cases]


def _load(folder: Path, case: dict[str, Any]) -> GoldenCase:
    tensors = load_file(folder / case["file"])
    return GoldenCase(
        name=case["name"],
        options=case["options"],
        inputs=_under("input.", tensors),
        expected=_under("expected.", tensors),
        tolerance=_under("expected.", case["tolerance"]),
    )


def _under(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    return {n.removeprefix(prefix): v for n, v in values.items() if n.startswith(prefix)}
