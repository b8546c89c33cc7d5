"""Artefacts: what is computed from the rows of a cache and kept in a folder of it.

An artefact is laid out as a cache is, with attempts, commits and snapshots, so whatever reads,
checks and cleans those serves it too. Only its identity has another name, and so it cannot be
opened as a cache by mistake.
"""

import re
import time
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline.cache import layout, snapshot
from pipeline.cache.commit import differences
from pipeline.cache.reader import SnapshotReader
from pipeline.cache.record import dump_record, read_record
from pipeline.errors import AlreadyExistsError, CacheFormatError, ConfigError, NotFoundError
from pipeline.storage import Store, open_store

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)


class _Identity(BaseModel):
    kind: str
    settings: dict[str, Any]


def artefact_store(cache: Store, kind: str, name: str) -> Store:
    """Return the folder of an artefact, which need not exist yet.

    Raises:
        ConfigError: the name is not plain.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(f"name {name!r} of an artefact: use letters, digits, '_', '-' and '.'")
    return open_store(cache.url_of(layout.artefact_path(kind, name)))


def list_artefacts(cache: Store) -> Iterator[tuple[str, str]]:
    """Yield kind and name of the artefacts of a cache, sorted."""
    for kind in cache.list_names(layout.ARTEFACTS):
        for name in cache.list_names(f"{layout.ARTEFACTS}/{kind}"):
            yield kind, name


def claim_artefact(store: Store, kind: str, settings: Mapping[str, Any]) -> None:
    """Create the identity of an artefact, or check that the one in place has the same settings.

    Args:
        store: of `artefact_store`.
        kind: of artefact.
        settings: JSON that tells all that changes stored values.

    Raises:
        ConfigError: it was made with other settings; names those that differ.
    """
    record = {"kind": kind, "settings": settings, "created_at": time.time()}
    try:
        store.put_once(layout.ARTEFACT_PATH, dump_record(record, layout.FORMAT_VERSION))
    except AlreadyExistsError:
        standing = read_artefact(store, kind)
        if found := "; ".join(differences(standing, settings)):
            raise ConfigError(
                f"{store.url} was made with other settings ({found}): choose another name, or the "
                "settings of that artefact"
            ) from None


def read_artefact(store: Store, kind: str) -> dict[str, Any]:
    """Return the settings of an artefact.

    Raises:
        CacheFormatError: there is none, it is damaged, or of another kind.
    """
    try:
        record = read_record(store, layout.ARTEFACT_PATH, versions=layout.FORMAT_VERSIONS)
    except NotFoundError as err:
        raise CacheFormatError(
            f"{store.url} is not an artefact: it has no {layout.ARTEFACT_PATH}"
        ) from err
    try:
        identity = _Identity.model_validate(record)
    except ValidationError as err:
        (first, *_) = err.errors()
        place = ".".join(map(str, first["loc"]))
        raise CacheFormatError(
            f"{store.url}/{layout.ARTEFACT_PATH} is damaged: {place}: {first['msg']}"
        ) from err
    if identity.kind != kind:
        raise CacheFormatError(f"{store.url} is an artefact {identity.kind!r}, expected {kind!r}")
    return identity.settings


def artefact_rows(store: Store) -> SnapshotReader:
    """Open the rows of an artefact: of its latest snapshot, or of what is committed now."""
    latest = snapshot.latest_snapshot(store)
    if latest is not None:
        return SnapshotReader(store=store, snapshot=latest)
    found, tables = snapshot.collect_snapshot(store)
    return SnapshotReader(store=store, snapshot=found, tables=tables)
