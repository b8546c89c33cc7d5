"""Which shards there are."""

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import braceexpand

from pipeline.errors import ConfigError, NotFoundError
from pipeline.storage import find_inputs, read_input
from pipeline.types import ShardRef

_LIST_SUFFIXES = (".txt", ".list")
_REQUESTS_AT_ONCE = 16
_STEM_CHARACTERS = 80
_MAX_SHARDS = 4_000_000  # that braces may stand for
_INNERMOST = re.compile(r"\{[^{}]*\}")
_RANGE = re.compile(r"\{(-?[0-9]+)\.\.(-?[0-9]+)(?:\.\.-?[0-9]+)?\}")


def expand_shards(
    spec: str | Sequence[str], *, allow_list_schemes: Sequence[str] = ()
) -> list[ShardRef]:
    """Return all shards that a specification names, sorted by URL, each once.

    Args:
        spec: one of these, or several:
            a URL or path of a shard; a brace pattern (`shard-{000000..000999}.tar`);
            a glob pattern (`*`, `**`, `?`, `[...]`); a folder, for the `*.tar` directly in it;
            or a text file (`.txt`, `.list`) of any of the former, one per line, relative to
            the text file, with `#` for comments. A text file that lies on a store may name
            objects of the same kind of store only (over http: of the same server); whoever wrote
            it must not make this machine read its own files.
        allow_list_schemes: what else such a text file may name: `s3`, `https`, `file` and so on.

    Raises:
        ConfigError: a shard or list is missing, a pattern or folder gives none, or a pattern is
            malformed. All that is missing is reported at once.
        StorageError: a store cannot be read.
    """
    items = [spec] if isinstance(spec, str) else list(spec)
    urls = [url for item in items for url in _without_lists(item, allow_list_schemes)]
    if not urls:
        raise ConfigError("no shards: the list of inputs is empty")
    with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
        found = list(pool.map(_find, urls))
    missing = [url for url, shards in zip(urls, found, strict=True) if not shards]
    if missing:
        named = ", ".join(repr(url) for url in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ConfigError(f"no shards found for {named}{more}; check the paths and patterns")
    shards = {shard.url: shard for some in found for shard in some}
    return [shards[url] for url in sorted(shards)]


def shard_id(shard: ShardRef) -> str:
    """Return a name for a shard that can be part of a path.

    It is the file's stem, to be readable, and 12 hexadecimal digits of the SHA-256 of the URL, so
    that shards of one name in different folders stay apart. It depends on nothing but the URL.
    """
    stem = re.sub(r"\.tar$", "", shard.url.rstrip("/").rsplit("/", 1)[-1])
    readable = re.sub(r"[^A-Za-z0-9_-]", "_", stem)[:_STEM_CHARACTERS] or "shard"
    digest = hashlib.sha256(shard.url.encode("utf-8", "surrogateescape")).hexdigest()
    return f"{readable}-{digest[:12]}"


def _without_lists(item: str, allowed: Sequence[str]) -> Iterable[str]:
    for url in _expand_braces(item):
        if not url.endswith(_LIST_SUFFIXES):
            yield url
            continue
        for line in _lines(url):
            for entry in _expand_braces(line):
                if entry.endswith(_LIST_SUFFIXES):
                    raise ConfigError(f"list {url!r} names another list: {entry!r}")
                _check_entry(entry, url, allowed)
                yield entry


def _check_entry(entry: str, url: str, allowed: Sequence[str]) -> None:
    """Refuse what a list on a store must not name."""
    mine, theirs = _scheme(url), _scheme(entry)
    if mine == "file" or theirs in allowed:
        return
    # Over http another server is another store: an address inside this network, say.
    is_same = theirs == mine and (
        mine not in ("http", "https") or urlsplit(entry).netloc == urlsplit(url).netloc
    )
    if not is_same:
        raise ConfigError(
            f"list {url!r} names a place on another store ({entry!r}); to allow "
            f"that, put {theirs!r} into input.allow_list_schemes"
        )


def _scheme(url: str) -> str:
    scheme, sep, _ = url.partition("://")
    return scheme.lower() if sep and scheme.lower() != "local" else "file"


def _lines(url: str) -> list[str]:
    try:
        text = read_input(url).decode("utf-8")
    except NotFoundError as err:
        raise ConfigError(f"list of shards {url!r} does not exist") from err
    except UnicodeDecodeError as err:
        raise ConfigError(f"list of shards {url!r} is not UTF-8 text") from err
    lines = (line.strip() for line in text.splitlines())
    entries = [line for line in lines if line and not line.startswith("#")]
    if not entries:
        raise ConfigError(f"list of shards {url!r} names none")
    folder = url.rpartition("/")[0] + "/" if "/" in url else ""
    return [e if "://" in e or os.path.isabs(e) else folder + e for e in entries]


def _expand_braces(item: str) -> list[str]:
    if "{" not in item:
        return [item]
    if _count_braces(item) > _MAX_SHARDS:
        raise ConfigError(f"input {item!r} stands for more than {_MAX_SHARDS} shards")
    try:
        return list(braceexpand.braceexpand(item))
    except ValueError as err:
        raise ConfigError(f"input {item!r} has unbalanced braces") from err


def _count_braces(item: str) -> int:
    """Return at least how many names a pattern stands for, without unfolding it."""
    count = 1
    while (found := _INNERMOST.search(item)) and count <= _MAX_SHARDS:
        between = _RANGE.fullmatch(found.group())
        if between is None:
            count *= 1 + found.group().count(",")
        else:
            low, high = between.groups()
            # Longer numbers than these stand for too many, whatever they are.
            is_short = len(low) < 19 and len(high) < 19
            count *= 1 + abs(int(high) - int(low)) if is_short else _MAX_SHARDS + 1
        item = item[: found.start()] + item[found.end() :]
    return count


def _find(url: str) -> list[ShardRef]:
    try:
        return find_inputs(url, suffix=".tar")
    except NotFoundError:
        return []
