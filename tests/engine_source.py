"""Runs single files of an engine's unpacked package, with stand-ins for all they import of it.

The engines need a GPU and other versions of torch, so they cannot be installed here. Unpack their
wheels (`python -m wheel unpack`, or unzip) outside of this repository and name the folders:
CARVE_VLLM_SOURCE, CARVE_SGLANG_SOURCE. Tests that need one are skipped without.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import pytest


def unpacked(package: str, version: str) -> Path:
    """Return the folder that holds an unpacked package, or skip the calling module or test."""
    variable = f"CARVE_{package.upper()}_SOURCE"
    if not os.environ.get(variable):
        pytest.skip(
            f"{variable} does not name the unpacked wheel of {package} {version}",
            allow_module_level=True,
        )
    root = Path(os.environ[variable])
    found = {folder.name for folder in root.glob(f"{package}-*.dist-info")}
    if found != {f"{package}-{version}.dist-info"}:
        pytest.fail(f"{root} holds {found or 'no package'}, expected {package} {version}")
    return root


class _StandInClass(type(Protocol)):  # type: ignore[misc]  # so that it mixes with protocols
    """Lets constants be read off a stand-in of a class."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn()


class StandIn(metaclass=_StandInClass):
    """Whatever an engine's file imports from files that are not run; remembers how it was made."""

    made_with: Mapping[str, Any]

    def __new__(cls, *_: Any, **options: Any) -> Any:
        self = super().__new__(cls)
        self.made_with = options
        return self

    def __init__(self, *args: Any, **options: Any) -> None:
        order = type(self).__mro__
        if order[order.index(StandIn) + 1] is not object:  # stands before a real class
            super().__init__(*args, **options)

    def __init_subclass__(cls, **_: Any) -> None:
        super().__init_subclass__()

    def __class_getitem__(cls, _: Any) -> type:
        return cls

    def __getitem__(self, _: Any) -> "StandIn":
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn()

    def __call__(self, *args: Any, **options: Any) -> Any:
        # Decorators give back what they decorate; with options, they are made first.
        return args[0] if len(args) == 1 and callable(args[0]) and not options else self

    def __or__(self, _: Any) -> "StandIn":
        return self

    __ror__ = __or__

    def __bool__(self) -> bool:
        return False


class StandInModule(ModuleType):
    """A module of stand-ins: a class of its own for every capitalised name."""

    __path__: Sequence[str] = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        is_class = name[:1].isupper() and not name.isupper()
        value = type(name, (StandIn,), {}) if is_class else StandIn()
        setattr(self, name, value)
        return value


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the chosen files of one package where they are, and stand-ins for all others."""

    def __init__(self, root: Path, packages: Sequence[str], real: Sequence[str]) -> None:
        self.root, self.packages, self.real = root, packages, real

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        del path, target
        if not is_within(name, self.packages):
            return None
        if name in self.real:
            file = self.root.joinpath(*name.split(".")).with_suffix(".py")
            return importlib.util.spec_from_file_location(name, file)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return StandInModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        module.__path__ = []


def is_within(name: str, packages: Sequence[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


@contextmanager
def running_source(
    root: Path, packages: Sequence[str], real: Sequence[str]
) -> Iterator[dict[str, ModuleType]]:
    """Import files of an unpacked package.

    Args:
        root: folder that holds the package.
        packages: what the finder answers for: the package, and what else its files import that
            is not installed.
        real: dotted names of the modules whose files are run; all others are stand-ins.
    """
    finder = _Finder(root, packages, real)
    before = set(sys.modules)
    sys.meta_path.insert(0, finder)
    try:
        with warnings.catch_warnings():
            # Of the engine's files, about the versions installed here.
            warnings.simplefilter("ignore")
            modules = {name: importlib.import_module(name) for name in real}
        yield modules
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n in sys.modules if n not in before and is_within(n, packages)]:
            del sys.modules[name]
            parent, _, child = name.rpartition(".")
            vars(sys.modules.get(parent, ModuleType(""))).pop(child, None)
