"""The samples of one shard."""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

from webdataset.tariterators import base_plus_ext, group_by_keys

from pipeline.errors import ConfigError
from pipeline.source._tar import ByteStream, Member, TarReader, TruncatedError
from pipeline.storage import open_input
from pipeline.types import RejectedSample, Sample, ShardRef

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's own rule for files that are no samples


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceOptions:
    """How shards are read.

    Attributes:
        image_suffixes: a sample has exactly one member of these (lower case, no dot).
        column_suffixes: members of these are kept with the sample, as bytes. Others are ignored.
        max_member_bytes: a sample with a larger member is rejected, unread.
        on_truncated: whether a shard that is cut off is an error, or what is whole is used.
    """

    image_suffixes: tuple[str, ...] = ("jpg", "jpeg", "png", "webp")
    column_suffixes: tuple[str, ...] = ("json", "txt", "cls")
    max_member_bytes: int = 128 * 2**20
    on_truncated: Literal["fail", "commit_partial"] = "fail"

    def __post_init__(self) -> None:
        if not self.image_suffixes:
            raise ConfigError("image_suffixes is empty; name at least one, for example jpg")
        for suffix in (*self.image_suffixes, *self.column_suffixes):
            if not suffix or suffix != suffix.lower() or suffix.startswith((".", "__")):
                raise ConfigError(f"suffix {suffix!r} must be lower case and without the dot")
        if both := sorted(set(self.image_suffixes) & set(self.column_suffixes)):
            raise ConfigError(f"suffixes {both} are both of images and of columns")
        if self.max_member_bytes < 1:
            raise ConfigError(f"max_member_bytes must be at least 1, is {self.max_member_bytes}")
        if self.on_truncated not in ("fail", "commit_partial"):
            raise ConfigError(
                f"on_truncated must be 'fail' or 'commit_partial', is {self.on_truncated!r}"
            )


def read_shard(
    shard: ShardRef, options: SourceOptions | None = None, *, stream: ByteStream | None = None
) -> Iterator[Sample | RejectedSample]:
    """Give a shard's samples in order, and what had to be rejected, each with its reason.

    Reasons are `no_image`, `ambiguous_image` (several), `empty_image`, `member_too_large`,
    `bad_key` (a name that is not UTF-8), `duplicate_key` (the key was seen before: the first
    group of members keeps it, also where members of two samples alternate) and `truncated`.

    Memory is bounded by one sample, and by the keys. Samples are given before the end of the shard
    has been verified: use them for good only when the iteration ends without an error.

    With `on_truncated="commit_partial"`, a sample that may be cut is rejected, the ones before it
    are given, and the iteration ends normally. Its key is "" where the cut leaves no name. If the
    cut is between two members, the last sample may lack some, so that one is rejected.

    Args:
        shard: as `expand_shards` lists it.
        options: the defaults if not given.
        stream: the shard's bytes, if they are not to be opened here; not closed.

    Raises:
        ShardError: with `reason` `truncated`, `empty` (no bytes), `corrupt_header`,
            `trailing_data` or `unsupported_member`, and the byte offset.
        StorageError: the shard cannot be read, or is not the one listed any more.
    """
    options = options or SourceOptions()
    with ExitStack() as stack:
        opened = stack.enter_context(open_input(shard)) if stream is None else stream
        yield from _ShardReader(shard, options).samples(opened)


@dataclass(frozen=True, slots=True)
class _Unread:
    """Stands for the bytes of a member that were not read."""

    size: int


@dataclass(slots=True)
class _ShardReader:
    shard: ShardRef
    options: SourceOptions
    seen: set[str] = field(default_factory=set)
    key: str | None = None  # of the group being filled
    suffixes: set[str] = field(default_factory=set)  # of that group
    cut: TruncatedError | None = None
    cut_key: str | None = None

    def samples(self, stream: ByteStream) -> Iterator[Sample | RejectedSample]:
        is_cut_reported = False
        for group in group_by_keys(self._files(stream)):
            # After a cut, the group that is cut is the last one: it comes after the cut is known.
            key = group["__key__"]
            if self.cut is not None and key == self.cut_key:
                yield self._rejected(key, "truncated", str(self.cut))
                is_cut_reported = True
            else:
                yield self._sample(group)
        if self.cut is not None and not self.cut.is_in_end_mark and not is_cut_reported:
            yield self._rejected(self.cut_key or "", "truncated", str(self.cut))

    def _files(self, stream: ByteStream) -> Iterator[dict[str, Any]]:
        """Give members as webdataset's grouping takes them."""
        members = TarReader(
            stream,
            url=self.shard.url,
            size=self.shard.size,
            wants=self._wants,
            max_member_bytes=self.options.max_member_bytes,
        )
        try:
            for member in members:
                yield from self._file(member)
        except TruncatedError as err:
            if self.options.on_truncated == "fail":
                raise
            self.cut = err
            if not err.is_in_end_mark:
                key, _ = (None, None) if err.member is None else _split(err.member)
                self.cut_key = key or self.key

    def _file(self, member: Member) -> Iterator[dict[str, Any]]:
        key, suffix = _split(member.name)
        if key is None or suffix is None:
            return
        if key != self.key:
            self.key, self.suffixes = key, set()
        elif suffix in self.suffixes:  # the same key again: close the group, begin another
            self.suffixes = set()
            yield {}
        self.suffixes.add(suffix)
        data = _Unread(member.size) if member.data is None else member.data
        yield {"fname": member.name, "data": data, "__url__": self.shard.url}

    def _wants(self, name: str) -> bool:
        suffix = _split(name)[1]
        return suffix in self.options.image_suffixes or suffix in self.options.column_suffixes

    def _sample(self, group: Mapping[str, Any]) -> Sample | RejectedSample:
        key = group["__key__"]
        fault = self._fault(key, group)
        self.seen.add(key)
        if fault is not None:
            return self._rejected(key, *fault)
        (suffix,) = (s for s in self.options.image_suffixes if s in group)
        columns = {s: group[s] for s in self.options.column_suffixes if s in group}
        return Sample(key=key, image=group[suffix], suffix=suffix, columns=columns)

    def _fault(self, key: str, group: Mapping[str, Any]) -> tuple[str, str] | None:
        """Return reason and message if a sample cannot be used."""
        options = self.options
        if not _is_utf8(key):
            return "bad_key", "name is not UTF-8"
        if key in self.seen:
            return "duplicate_key", "an earlier sample of this shard has the same key"
        kept = [s for s in (*options.image_suffixes, *options.column_suffixes) if s in group]
        for suffix in kept:
            if isinstance(group[suffix], _Unread):
                size = group[suffix].size
                limit = f"max_member_bytes={options.max_member_bytes}"
                return "member_too_large", f"member .{suffix} of {size} bytes exceeds {limit}"
        images = [s for s in options.image_suffixes if s in group]
        if not images:
            found = ", ".join(sorted(s for s in group if not s.startswith("__"))[:8])
            wanted = ", ".join(options.image_suffixes)
            return "no_image", f"no member is an image ({wanted}); found: {found}"
        if len(images) > 1:
            return "ambiguous_image", f"several members are images: {', '.join(images)}"
        if not group[images[0]]:
            return "empty_image", f"member .{images[0]} has no bytes"
        return None

    def _rejected(self, key: str, reason: str, message: str) -> RejectedSample:
        key = key.encode("utf-8", "backslashreplace").decode("utf-8")
        message = message.encode("utf-8", "backslashreplace").decode("utf-8")
        place = "" if self.shard.url in message else f"{self.shard.url}: {key}: "
        # One line that does nothing to a terminal: names in an archive are anybody's.
        line = _CONTROL.sub(lambda found: repr(found.group())[1:-1], f"{place}{message}")
        return RejectedSample(key=key, stage="source", reason=reason, message=line)


def _split(name: str) -> tuple[str | None, str | None]:
    """Return key and suffix of a member by webdataset's rule; None twice if it has none."""
    if _META.match(name):
        return None, None
    key, suffix = base_plus_ext(name)
    # webdataset keeps its own notes in the same dictionary, under names like these.
    if key is None or suffix.startswith("__"):
        return None, None
    return key, suffix.lower()


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
