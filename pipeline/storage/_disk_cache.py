"""Keep blocks of remote objects on a local disk."""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from pipeline.errors import ConfigError, StorageError
from pipeline.storage._block_folder import TRAILER_BYTES, Block, BlockFolder, Claim
from pipeline.storage._pieces import Piece, adjacent, in_threads, pieces_of
from pipeline.storage._recently_used import RecentlyUsed
from pipeline.storage._shared_budget import LEDGER_BYTES
from pipeline.storage._store import Store
from pipeline.storage._views import fill, flat, scatter

logger = logging.getLogger(__name__)

BLOCK_BYTES = 8 * 2**20
REQUEST_BYTES = 32 * 2**20  # adjacent blocks are fetched together up to this
RETRY_S = 60.0  # after the folder could not be used
_BATCH_BLOCKS = 64  # claimed at once, an open file each
_MOST_OPEN = 32
_MOST_SIZES = 1 << 16


class DiskCache:
    """A folder on a local disk that keeps what was read of objects which never change.

    An object is kept in aligned blocks, so that what is read once is fetched once a machine: of
    all threads and processes that want a block which is not there, one fetches it and the others
    wait. Threads and processes, forked ones too, may share the folder; what travels to another
    process by pickling is the folder's name and the limits.

    The folder holds at most `max_bytes`; what was used least recently, by any process, to a minute,
    goes first, until a tenth is free. Processes that give different limits for one folder each
    enforce their own when they write, so the folder shrinks to the smallest whenever its process
    does. The 32 blocks that a process used last stay open there; evicted meanwhile, they take
    their disk space until it has read others.

    A block whose checksum does not fit is logged, deleted and fetched again. Where the folder
    cannot be written, or the disk is full, reading goes on from the store, nothing more is kept
    for a minute, and a warning is logged, once in each process.

    Args:
        folder: need not exist yet. Files in it that are not of a cache are left alone.
        max_bytes: that all files of the cache may take, at least one block.
        block_bytes: what is fetched at least, at least 1. Small ones cost requests, large ones
            cost bytes that nobody wanted.

    Raises:
        ConfigError: a limit is too small, or the folder is not a local one.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        max_bytes: int,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        if "://" in os.fspath(folder):
            raise ConfigError(f"disk cache {folder!r}: must be a folder on a local disk")
        least = block_bytes + TRAILER_BYTES + LEDGER_BYTES
        if block_bytes < 1 or max_bytes < least:
            raise ConfigError(
                f"disk cache {folder!s}: max_bytes={max_bytes} does not hold one block of "
                f"block_bytes={block_bytes}; give at least {max(least, 1)}, or smaller blocks (of "
                "1 byte or more)"
            )
        self.folder = os.path.abspath(folder)
        self.max_bytes = max_bytes
        self.block_bytes = block_bytes
        self._most_together = max(1, REQUEST_BYTES // block_bytes)
        self._blocks = BlockFolder(self.folder, max_bytes)
        self._open: RecentlyUsed[tuple[str, int], Block] = RecentlyUsed(_MOST_OPEN)
        self._sizes: RecentlyUsed[str, int] = RecentlyUsed(_MOST_SIZES)
        self._retry_at = 0.0  # by the monotonic clock
        self._has_warned = False

    def __repr__(self) -> str:
        return (
            f"DiskCache({self.folder!r}, max_bytes={self.max_bytes}, "
            f"block_bytes={self.block_bytes})"
        )

    def __reduce__(self) -> tuple[Callable[[], DiskCache], tuple[()]]:
        """Travel to another process without what this one has open."""
        limits = {"max_bytes": self.max_bytes, "block_bytes": self.block_bytes}
        return functools.partial(DiskCache, self.folder, **limits), ()

    def read_range(
        self, store: Store, path: str, offset: int, length: int, *, size: int | None = None
    ) -> bytes:
        """Return exactly `length` bytes of an object from `offset` on, as `Store.read_range` does.

        Args:
            store: where the object is, should it not be kept.
            path: of an object that never changes.
            offset: of the first byte.
            length: bytes wanted.
            size: of the whole object, if it is known; else the store may be asked for it, once in
                each process.

        Raises:
            StorageError: there are fewer bytes, or the store fails; `NotFoundError` where there is
                no object. An object that was deleted may still be kept.
        """
        if length < 0:
            raise StorageError(f"cannot read {length} bytes at {offset} of {store.url_of(path)}")
        number, at = divmod(offset, self.block_bytes)
        if at + length <= self.block_bytes and offset >= 0:
            block = self._block(store.url_of(path), number)
            if block is not None and at + length <= block.length:
                kept = _try_read(block, at, length)
                if len(kept) == length:
                    return kept
        content = io.BytesIO(bytes(length))  # gives its bytes away without a copy
        with content.getbuffer() as view:
            self.read_into(store, path, offset, [view], size=size)
        return content.getvalue()

    def read_into(
        self,
        store: Store,
        path: str,
        offset: int,
        views: Sequence[memoryview],
        *,
        size: int | None = None,
    ) -> None:
        """Fill writable views one after the other with an object's bytes from `offset` on.

        Args:
            store: as of `read_range`, and so are `path`, `offset` and `size`.
            path: of the object.
            offset: of the first byte.
            views: contiguous, of any format; they have undefined content after an error.
            size: of the object.

        Raises:
            StorageError: as of `read_range`.
            TypeError: a view cannot be written.
        """
        if offset < 0:
            raise StorageError(f"cannot read at {offset} of {store.url_of(path)}")
        source = _Source(store, path, store.url_of(path), size)
        pieces = list(pieces_of(offset, flat(views), self.block_bytes))
        for start in range(0, len(pieces), _BATCH_BLOCKS):
            batch = pieces[start : start + _BATCH_BLOCKS]
            missing = [piece for piece in batch if not self._serve(source, piece)]
            if missing:
                self._bring(source, missing)

    def size(self, store: Store, path: str) -> int:
        """Return an object's size in bytes; asks the store at most once in each process.

        Raises:
            StorageError: the store fails; `NotFoundError` where there is no object.
        """
        url = store.url_of(path)
        known = self._sizes.get(url)
        if known is None:
            first = self._block(url, 0)
            known = store.size(path) if first is None else first.object_size
            self._sizes.put(url, known)
        return known

    # What is kept

    def _block(self, url: str, number: int) -> Block | None:
        """Return a block that is kept and whole, and count it as used."""
        block = self._open.get((url, number))
        if block is None:
            try:
                block = self._blocks.open(self._name(url, number))
            except OSError as err:
                self._pause(err)
                return None
            if block is None:
                return None
            if not block.is_whole:
                self._remove(url, number, block)
                return None
            self._open.put((url, number), block)
        block.touch()
        return block

    def _serve(self, source: _Source, piece: Piece) -> bool:
        """Fill a piece from a block that is kept, if it is.

        Raises:
            StorageError: the object has fewer bytes.
        """
        block = self._block(source.url, piece.number)
        if block is None:
            return False
        if piece.end > block.length:
            self._check_is_there(source, piece)
        elif _try_fill(block, piece):
            return True
        # Cut short since it was opened, or written by one who was told too small a size.
        self._remove(source.url, piece.number, block)
        return False

    def _remove(self, url: str, number: int, block: Block) -> None:
        name = self._name(url, number)
        logger.warning(
            "block %d of %s in %s is damaged; fetching it again",
            number,
            url,
            self._blocks.path(name),
        )
        self._open.forget((url, number))
        try:
            self._blocks.remove(name, block)
        except OSError as err:
            self._pause(err)

    def _name(self, url: str, number: int) -> str:
        what = f"{number} {self.block_bytes} {url}"
        return hashlib.blake2b(what.encode(), digest_size=20).hexdigest()

    # What is not

    def _bring(self, source: _Source, missing: Sequence[Piece]) -> None:
        """Fill pieces whose blocks are not kept, and keep them, or wait for who does so."""
        while missing and not self._is_paused:
            self._check_is_there(source, missing[-1])
            claims = self._claim(source, missing)
            own = [piece for piece in missing if piece.number in claims]
            if own:
                missing = [piece for piece in missing if piece.number not in claims]
                self._fetch(source, own, claims)
            elif not self._is_paused:
                self._wait(source, missing[0])
            missing = [piece for piece in missing if not self._serve(source, piece)]
        in_threads(lambda group: self._read(source, group), adjacent(missing, self._most_together))

    def _claim(self, source: _Source, missing: Sequence[Piece]) -> dict[int, Claim]:
        """Return claims to those blocks that nobody else fetches at this moment."""
        claims: dict[int, Claim] = {}
        is_done = False
        try:
            for piece in missing:
                claim = self._blocks.try_claim(self._name(source.url, piece.number))
                if claim is not None:
                    claims[piece.number] = claim
            is_done = True
        except OSError as err:
            self._pause(err)
        finally:
            if not is_done:
                self._release(claims.values())
        return claims if is_done else {}

    def _wait(self, source: _Source, piece: Piece) -> None:
        try:
            self._blocks.wait(self._name(source.url, piece.number))
        except OSError as err:
            self._pause(err)

    def _fetch(self, source: _Source, pieces: Sequence[Piece], claims: dict[int, Claim]) -> None:
        try:
            in_threads(
                lambda group: self._fetch_group(source, group, claims),
                adjacent(pieces, self._most_together),
            )
        finally:
            self._release(claims.values())

    def _fetch_group(
        self, source: _Source, group: Sequence[Piece], claims: dict[int, Claim]
    ) -> None:
        """Fill pieces of adjacent blocks by one request for all of these blocks, and keep them."""
        size = self._size_of(source)
        first = group[0].number * self.block_bytes
        end = min(size, (group[-1].number + 1) * self.block_bytes)
        content = memoryview(source.store.read_range(source.path, first, end - first))
        for piece in group:
            block, content = content[: self.block_bytes], content[self.block_bytes :]
            scatter(block[piece.at : piece.end], piece.views)
            claim = claims.pop(piece.number)
            self._keep(claim, block, size)
            self._release([claim])  # others may wait for it

    def _keep(self, claim: Claim, content: memoryview, object_size: int) -> None:
        if self._is_paused:
            return
        try:
            self._blocks.keep(claim, content, object_size)
        except OSError as err:
            self._pause(err)

    def _release(self, claims: Iterable[Claim]) -> None:
        for claim in claims:
            # What cannot be deleted now is by the next one who claims it, or by an eviction.
            with suppress(OSError):
                self._blocks.release(claim)

    def _read(self, source: _Source, group: Sequence[Piece]) -> None:
        """Fill pieces that follow each other, straight from the store."""
        offset = group[0].number * self.block_bytes + group[0].at
        views = [view for piece in group for view in piece.views]
        source.store.read_into(source.path, offset, views)

    def _size_of(self, source: _Source) -> int:
        return self.size(source.store, source.path) if source.size is None else source.size

    def _check_is_there(self, source: _Source, piece: Piece) -> None:
        end = piece.number * self.block_bytes + piece.end
        if end <= self._size_of(source):
            return
        if source.size is None:  # what is kept may be of one who was told too small a size
            self._sizes.put(source.url, source.store.size(source.path))
        size = self._size_of(source)
        if end > size:
            raise StorageError(
                f"cannot read {source.url} ({size} bytes): asked for bytes up to {end}"
            )

    # Whether anything can be kept

    @property
    def _is_paused(self) -> bool:
        return time.monotonic() < self._retry_at

    def _pause(self, err: OSError) -> None:
        self._retry_at = time.monotonic() + RETRY_S
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "cannot use disk cache %s (%s); reading on from the store, and trying again every "
                "%.0f s",
                self.folder,
                err,
                RETRY_S,
            )


@dataclass(frozen=True, slots=True)
class _Source:
    """An object of a store."""

    store: Store
    path: str
    url: str
    size: int | None  # bytes, as the caller knows it


def _try_read(block: Block, at: int, length: int) -> bytes:
    try:
        return os.pread(block.file.number, length, at)
    except OSError:  # a sector that cannot be read
        return b""


def _try_fill(block: Block, piece: Piece) -> bool:
    try:
        return fill(block.file.number, piece.at, piece.views)[1] == piece.length
    except OSError:
        return False
