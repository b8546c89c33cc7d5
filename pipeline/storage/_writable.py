"""Prove that a store can be written, and keeps what the commit protocol rests on."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

from pipeline.errors import AlreadyExistsError, ConfigError, StorageError
from pipeline.storage import _local
from pipeline.storage._retry import is_not_implemented

if TYPE_CHECKING:
    from pipeline.storage._store import Store


def check_writable(store: Store) -> None:
    """Create one object twice; see `Store.check_writable`."""
    # Should this process be killed, it is one more thing that a writer left unfinished.
    probe = f".carve-probe-{uuid.uuid4().hex}{_local.TEMPORARY_SUFFIX}"
    first, second = b"first", b"second"
    try:
        store.put_once(probe, first)
        try:
            store.put_once(probe, second)
            honoured = False
        except AlreadyExistsError:
            honoured = store.read(probe) == first
        store.delete(probe)
    except StorageError as err:
        if err.__cause__ is not None and is_not_implemented(err.__cause__):
            raise ConfigError(
                f"store {store.url} does not support put-if-absent ({err}); two jobs could "
                "overwrite each other: use a store that does"
            ) from err
        raise ConfigError(
            f"store {store.url} cannot be written: {err}; check that the place exists, the "
            "permissions, and that it supports put-if-absent (hard links, on a local disk)"
        ) from err
    if not honoured:
        raise ConfigError(
            f"store {store.url} ignores put-if-absent (it let a second writer replace an "
            "object); two jobs could overwrite each other: use a store that honours it"
        )
