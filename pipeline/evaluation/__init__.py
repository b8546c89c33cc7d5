"""What carving costs: measured, tabulated and drawn.

>>> from pipeline.evaluation import evaluate, load_evaluation, resolve_evaluation
>>> summary = evaluate(resolve_evaluation(load_evaluation("evaluate.yaml")))   # doctest: +SKIP
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.evaluation.results import read_summary, read_tables
    from pipeline.evaluation.run import evaluate
    from pipeline.evaluation.settings import load_evaluation, parse_evaluation
    from pipeline.evaluation.task import resolve_evaluation

__all__ = [
    "evaluate",
    "load_evaluation",
    "parse_evaluation",
    "read_summary",
    "read_tables",
    "resolve_evaluation",
]

_HOME = {
    "evaluate": "run",
    "load_evaluation": "settings",
    "parse_evaluation": "settings",
    "read_summary": "results",
    "read_tables": "results",
    "resolve_evaluation": "task",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401  (any public name)
    """Import a public name when it is first used: pictures need no language model."""
    if name in _HOME:
        return getattr(importlib.import_module(f"pipeline.evaluation.{_HOME[name]}"), name)
    raise AttributeError(f"module 'pipeline.evaluation' has no attribute {name!r}")
