"""Lead the drivers of this process to a server."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import fsspec
import pytest

_KINDS = ("AWS_", "AZURE_", "STORAGE_EMULATOR_")
_made_under: list[dict[str, str]] = []  # the variables that the drivers there are have seen


@contextmanager
def client_environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment for a block; those of other stores are gone meanwhile.

    Drivers read them when they are made, and fsspec keeps what it made: where the variables are
    others than the last time, it is made to forget.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(_KINDS)]:
            patch.delenv(name)
        for name, value in values.items():
            patch.setenv(name, value)
        if _made_under != [dict(values)]:
            _made_under[:] = [dict(values)]
            for protocol in ("s3", "abfs", "gs"):
                fsspec.get_filesystem_class(protocol).clear_instance_cache()
        yield
