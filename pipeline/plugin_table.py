"""Tables of plug-ins, made from their classes and module docstrings."""

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence


def brief(
    names: Sequence[str],
    load: Callable[[str], type],
    columns: Mapping[str, Callable[[type], str]],
) -> str:
    """Return a Markdown table: name, what it does, and what `columns` say of each class."""
    lines = [
        f"| {' | '.join(['name', 'what it does', *columns])} |",
        "|" + "---|" * (2 + len(columns)),
    ]
    for name in names:
        kind = load(name)
        document = sys.modules[kind.__module__].__doc__ or ""
        cells = [f"`{name}`", _first_line(document), *(column(kind) for column in columns.values())]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def full(names: Sequence[str], load: Callable[[str], type]) -> str:
    """Return a Markdown table: name, what it does, options with their defaults, source."""
    lines = ["| name | what it does | options | source |", "|---|---|---|---|"]
    for name in names:
        kind = load(name)
        document = sys.modules[kind.__module__].__doc__ or ""
        options = ", ".join(
            f"`{field.name}={_default(field)}`"
            for field in dataclasses.fields(kind)
            if field.init and not field.name.startswith("_")
        )
        lines.append(f"| `{name}` | {_first_line(document)} | {options} | {_source(document)} |")
    return "\n".join(lines)


def _first_line(document: str) -> str:
    return document.strip().splitlines()[0].rstrip(".") if document.strip() else ""


def _default(field: "dataclasses.Field[object]") -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default).replace("|", "\\|")
    if field.default_factory is not dataclasses.MISSING:
        return repr(field.default_factory()).replace("|", "\\|")
    return "required"


def _source(document: str) -> str:
    """Return the text after `Source:` up to the next line that starts a section, on one line."""
    _, found, rest = document.partition("Source:")
    if not found:
        return ""
    words: list[str] = []
    for line in rest.splitlines():
        if not line.strip() or line.split(":")[0].strip() in ("Differs", "Needs", "Cost"):
            break
        words.append(line.strip())
    return " ".join(words).rstrip(".").replace("|", "\\|")
