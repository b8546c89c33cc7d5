"""Find a plug-in by its file name and build it from plain values.

A plug-in folder holds one module per plug-in; the module's name is the plug-in's name in configs,
on the command line, in manifests and in reports. Modules whose name starts with `_` are not
plug-ins. Nothing is imported before it is asked for.
"""

import dataclasses
import difflib
import importlib
import inspect
import json
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter, ValidationError

from pipeline.errors import ConfigError

T = TypeVar("T")


class Registry(Generic[T]):
    """The plug-ins of one kind: the modules of one package.

    Args:
        kind: what a plug-in is called in messages, for example `carver`.
        package: dotted name of the package that holds the modules.
        base: the abstract class each module subclasses exactly once.
    """

    def __init__(self, kind: str, package: str, base: type[T]) -> None:
        self.kind = kind
        self.package = package
        self.base = base

    def names(self) -> list[str]:
        """Return the names of all plug-ins, sorted, importing none of them."""
        paths = importlib.import_module(self.package).__path__
        return sorted(m.name for m in pkgutil.iter_modules(paths) if not m.name.startswith("_"))

    def load(self, name: str) -> type[T]:
        """Return the class of one plug-in.

        Raises:
            ConfigError: there is no such plug-in.
            TypeError: its module does not define exactly one concrete class of this kind.
        """
        known = self.names()
        if name not in known:
            raise ConfigError(f"no {self.kind} named {name!r}{did_you_mean(name, known)}")
        module = importlib.import_module(f"{self.package}.{name}")
        found = [
            value
            for value in vars(module).values()
            if inspect.isclass(value)
            and issubclass(value, self.base)
            and not inspect.isabstract(value)
            and value.__module__ == module.__name__
        ]
        if len(found) != 1:
            raise TypeError(f"{module.__name__} must define exactly one {self.kind}, has {found}")
        return found[0]

    def build(self, name: str, options: Mapping[str, Any] | None = None) -> T:
        """Build a plug-in from options as a YAML file holds them.

        Raises:
            ConfigError: unknown name or option, wrong type, or a value out of range.
        """
        kind = self.load(name)
        fields = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
        try:
            # By way of JSON: strict about types, yet a list may fill a tuple.
            return TypeAdapter(kind).validate_json(json.dumps(dict(options or {})), strict=True)
        except ValidationError as err:
            reasons = "; ".join(_reason(detail, fields) for detail in err.errors())
            raise ConfigError(f"{self.kind} {name!r}: {reasons}") from err
        except TypeError as err:
            raise ConfigError(f"{self.kind} {name!r}: options must be plain values: {err}") from err


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return the end of a message about an unknown word: the nearest known ones, or all."""
    near = difflib.get_close_matches(word, known, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(known)}" if known else ""


def _reason(detail: Any, fields: Sequence[str]) -> str:  # noqa: ANN401  (pydantic's ErrorDetails)
    place = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "unexpected_keyword_argument":
        return f"no option {place!r}{did_you_mean(place, fields)}"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{place}: {message} (got {detail['input']!r})" if place else message
