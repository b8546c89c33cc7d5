"""Lead the drivers of this process to a server."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import fsspec
import pytest


@contextmanager
def client_environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment for a block.

    Drivers read them when they are made, and fsspec keeps what it made; so all are forgotten,
    before and after.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "AZURE_"))]:
            patch.delenv(name)
        for name, value in values.items():
            patch.setenv(name, value)
        _forget_drivers()
        try:
            yield
        finally:
            _forget_drivers()


def _forget_drivers() -> None:
    for protocol in ("s3", "abfs", "gs"):
        fsspec.get_filesystem_class(protocol).clear_instance_cache()
