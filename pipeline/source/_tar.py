"""Read an uncompressed tar archive front to back, strictly.

Headers are parsed, and their checksums verified, by `tarfile.TarInfo.frombuf`. The walk from header
to header is done here: `tarfile` ends it quietly at a damaged header, at a cut between two members
and at a missing end-of-archive mark, keeps every member in memory, and reads extended headers of
any claimed size.
"""

import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn, Protocol

from pipeline.errors import ShardError

BLOCK = tarfile.BLOCKSIZE
MAX_EXTENDED_HEADER_BYTES = 1 << 20  # of names; real ones have some hundred bytes

_ZERO_BLOCK = bytes(BLOCK)
_SKIP_BYTES = 1 << 20
_PAX_RECORD = re.compile(rb"(\d{1,7}) ([^=]+)=")
_PAX_SIZE = re.compile(r"[0-9]{1,19}", re.ASCII)
_PAX_TYPES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
_CONTINUED = b"M"  # the rest of a member that began in another volume of a GNU archive
_LONG_NAME_TYPES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


class ByteStream(Protocol):
    """What an archive is read from."""

    def read(self, length: int, /) -> bytes:
        """Return the next bytes; fewer than asked for only at the end."""


@dataclass(frozen=True, slots=True)
class Member:
    """One regular file of an archive."""

    name: str
    size: int  # bytes
    data: bytes | None  # None: not wanted, or larger than allowed


class TruncatedError(ShardError):
    """An archive ends too early.

    Attributes:
        member: name of the member that is cut; None if the cut is not inside one.
        is_in_end_mark: only the end-of-archive mark is cut; all members are whole.
    """

    member: str | None = None
    is_in_end_mark = False


class TarReader:
    """The members of one archive; iterate over it once.

    Args:
        stream: the archive's bytes.
        url: of the archive, for messages.
        size: of the archive in bytes, for messages.
        wants: tells from a member's name whether its bytes are of interest.
        max_member_bytes: larger members come without their bytes.
    """

    def __init__(
        self,
        stream: ByteStream,
        *,
        url: str,
        size: int,
        wants: Callable[[str], bool],
        max_member_bytes: int,
    ) -> None:
        self._stream, self._url, self._size = stream, url, size
        self._wants, self._max_member_bytes = wants, max_member_bytes
        self._offset = 0
        self._global_pax: dict[str, str] = {}

    def __iter__(self) -> Iterator[Member]:
        """Give the regular files in order; links, folders and devices are passed over.

        Raises:
            TruncatedError: the archive is cut off; raised after everything before the cut.
            ShardError: it is damaged or uses what cannot be read safely.
        """
        if self._size == 0:
            self._fail("empty", "the file has no bytes; an archive without members has 1,024")
        while (info := self._next_header()) is not None:
            # As tarfile has it: all but the known types without content are regular files.
            has_content = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
            if has_content:
                yield Member(info.name, info.size, self._content(info))
        self._check_end()

    def _next_header(self) -> tarfile.TarInfo | None:
        """Return the next member's header, extended headers applied; None at the end mark."""
        pax: dict[str, str] = {}
        long_name, is_extended = None, False
        while True:
            start = self._offset
            block = self._exactly(BLOCK, member=None)
            if block == _ZERO_BLOCK:
                if is_extended:
                    self._fail("corrupt_header", "an extended header is followed by the end", start)
                return None
            info = self._parse(block, start)
            if info.type in _PAX_TYPES:
                found = self._pax(info, start)
                if info.type == tarfile.XGLTYPE:
                    self._global_pax |= found
                else:
                    self._check_agreed(pax, found, start)
                    pax |= found
            elif info.type in _LONG_NAME_TYPES:
                text = self._extended(info, start).split(b"\0", 1)[0]
                if info.type == tarfile.GNUTYPE_LONGNAME:
                    found = {"path": text.decode("utf-8", "surrogateescape")}
                    self._check_agreed(
                        {} if long_name is None else {"path": long_name}, found, start
                    )
                    long_name = found["path"]
            else:
                self._check_agreed(pax, {} if long_name is None else {"path": long_name}, start)
                return self._apply(info, {**self._global_pax, **pax}, long_name, start)
            is_extended = info.type != tarfile.XGLTYPE

    def _parse(self, block: bytes, start: int) -> tarfile.TarInfo:
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as err:
            self._fail("corrupt_header", f"header is damaged ({err})", start, err)
        if info.size < 0:
            self._fail("corrupt_header", f"header gives a size of {info.size}", start)
        return info

    def _apply(
        self, info: tarfile.TarInfo, pax: dict[str, str], long_name: str | None, start: int
    ) -> tarfile.TarInfo:
        info.name = pax.get("path", info.name) if long_name is None else long_name
        if "size" in pax:
            if not _PAX_SIZE.fullmatch(pax["size"]):
                size = pax["size"][:40]
                self._fail("corrupt_header", f"extended header gives a size of {size!r}", start)
            info.size = int(pax["size"])
        if info.type == _CONTINUED:
            self._fail(
                "unsupported_member",
                f"member {info.name!r} is continued from another volume; join the volumes",
                start,
            )
        if info.type == tarfile.GNUTYPE_SPARSE or any(k.startswith("GNU.sparse") for k in pax):
            self._fail(
                "unsupported_member",
                f"member {info.name!r} is sparse; pack the shard without --sparse",
                start,
            )
        return info

    def _pax(self, info: tarfile.TarInfo, start: int) -> dict[str, str]:
        body, records, place = self._extended(info, start), {}, 0
        while match := _PAX_RECORD.match(body, place):
            end = match.start() + int(match.group(1))
            if end <= match.end() or end > len(body) or body[end - 1 : end] != b"\n":
                self._fail("corrupt_header", "extended header holds a damaged record", start)
            name = match.group(2).decode("utf-8", "surrogateescape")
            records[name] = body[match.end() : end - 1].decode("utf-8", "surrogateescape")
            place = end
        if body[place:].strip(b"\0"):
            self._fail("corrupt_header", "extended header holds more than records", start)
        return records

    def _check_agreed(self, known: dict[str, str], found: dict[str, str], start: int) -> None:
        """Refuse two extended headers of one member that differ: readers take one or the other."""
        for name in ("path", "size"):
            if name in known and name in found and known[name] != found[name]:
                self._fail("corrupt_header", f"two extended headers give a {name} each", start)

    def _extended(self, info: tarfile.TarInfo, start: int) -> bytes:
        if info.size > MAX_EXTENDED_HEADER_BYTES:
            self._fail("corrupt_header", f"extended header claims {info.size} bytes", start)
        body = self._exactly(info.size, member=None)
        self._exactly(-info.size % BLOCK, member=None)
        return body

    def _content(self, info: tarfile.TarInfo) -> bytes | None:
        padding = -info.size % BLOCK
        if info.size <= self._max_member_bytes and self._wants(info.name):
            data = self._exactly(info.size + padding, member=info.name)
            return data[: info.size] if padding else data
        self._skip(info.size + padding, info.name)
        return None

    def _skip(self, length: int, member: str) -> None:
        while length:
            step = min(length, _SKIP_BYTES)
            self._exactly(step, member=member)
            length -= step

    def _check_end(self) -> None:
        """Verify that the second block of the end mark follows, and only zeros after it."""
        start = self._offset
        if self._exactly(BLOCK, member=None, is_in_end_mark=True) != _ZERO_BLOCK:
            self._fail("corrupt_header", "one block of zeros instead of a header", start - BLOCK)
        while rest := self._stream.read(_SKIP_BYTES):
            if rest.count(0) != len(rest):
                self._fail(
                    "trailing_data",
                    "the archive ends, but the file goes on (joined archives are not supported)",
                    self._offset,
                )
            self._offset += len(rest)
        if self._offset != self._size:
            self._truncated(None, is_in_end_mark=True)

    def _exactly(self, length: int, *, member: str | None, is_in_end_mark: bool = False) -> bytes:
        data = self._stream.read(length)
        self._offset += len(data)
        if len(data) < length:
            self._truncated(member, is_in_end_mark=is_in_end_mark)
        return data

    def _truncated(self, member: str | None, *, is_in_end_mark: bool) -> NoReturn:
        place = f"inside member {member!r}" if member is not None else "without the end mark"
        message = f"{self._url} is cut off at byte {self._offset} of {self._size}, {place}"
        err = TruncatedError(message, shard=self._url, reason="truncated")
        err.member, err.is_in_end_mark = member, is_in_end_mark
        raise err

    def _fail(
        self, reason: str, message: str, offset: int = 0, cause: Exception | None = None
    ) -> NoReturn:
        place = f" at byte {offset} of {self._size}" if self._size else ""
        raise ShardError(
            f"{self._url}: {message}{place}", shard=self._url, reason=reason
        ) from cause
