"""Write the artefact `kv_prefix` of a cache.

A shard of the cache is one attempt and one commit here too: a run that was stopped goes on with the
shards that have none, and a cache that grew costs what is new.
"""

import logging
import platform
import time
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline import codecs
from pipeline.cache import layout
from pipeline.cache.artefact import artefact_store, claim_artefact
from pipeline.cache.commit import Commit, list_committed, rows_version, try_commit
from pipeline.cache.reader import RowPlace
from pipeline.cache.row import pack_aux
from pipeline.cache.snapshot import build_snapshot
from pipeline.cache.writer import RowToWrite, ShardWriter
from pipeline.carved_cache import CachedImage, CarvedCache, unpack_images
from pipeline.codecs import Codec
from pipeline.consumers.kv_artefact import KIND, artefact_settings
from pipeline.consumers.kv_packing import PackedPrefix, pack_prefix
from pipeline.consumers.kv_prefix import KVPrefix, fixed_prompt, make_prefixes
from pipeline.errors import NonFiniteError
from pipeline.storage import Store
from pipeline.types import Placement, RejectedSample, ShardRef

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PrefixSummary:
    """What one call of `write_prefixes` did."""

    url: str  # of the artefact
    num_shards: int  # of the cache
    num_done_before: int  # of them
    num_images: int  # written now
    num_rejected: int  # of them
    bytes_embeddings: int  # rows of the cache that were read
    bytes_prefixes: int  # rows that were written in their place


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    """One shard of the cache."""

    shard_id: str
    fingerprint: str
    groups: Sequence[tuple[str, int]]  # path of the part, row group
    num_bytes: int  # of the parts


def write_prefixes(  # noqa: PLR0913  (one argument a setting)
    cache: CarvedCache,
    model: Any,  # noqa: ANN401  (transformers is untyped)
    processor: Any,  # noqa: ANN401
    *,
    prompt: str,
    codec: str,
    codec_options: Mapping[str, Any] | None = None,
    placement: Placement = "packed",
    name: str | None = None,
    batch_size: int = 8,
    on_progress: Callable[[int], None] = lambda _: None,
) -> PrefixSummary:
    """Make the prefixes of all images of a cache that the artefact does not have yet.

    In memory are a batch of prefixes and a row group of packed ones, not more.

    Args:
        cache: of an encoder with a stage; with its `keep_tokens`.
        model: as for `make_prefixes`.
        processor: likewise.
        prompt: what stands before every question, with one image token.
        codec: of the keys and values.
        codec_options: of the codec.
        placement: of the kept tokens.
        name: of the artefact; the codec's if not given.
        batch_size: images that go through the model together.
        on_progress: told the number of images done since its last call.

    Raises:
        ConfigError: the model, prompt or codec cannot be used, or the artefact of this name was
            made with others; names what differs.
        CacheFormatError: a row of the cache is damaged.
        StorageError: the store cannot be read or written.
    """
    packer = codecs.build(codec, codec_options or {})
    settings = artefact_settings(cache, model, fixed_prompt(model, processor, prompt), placement)
    settings["codec"] = {"name": codec, "options": asdict(packer)}
    store = artefact_store(cache.reader.store, KIND, codec if name is None else name)
    maker = _Maker(
        cache=cache,
        store=store,
        settings=settings,
        fingerprint=layout.fingerprint(settings),
        codec=packer,
        batch_size=batch_size,
        make=lambda images: make_prefixes(
            model, processor, prompt, images, stage=settings["stage"], placement=placement
        ),
        on_progress=on_progress,
    )
    work = maker.work()
    done = list_committed(store)
    todo = [w for w in work if (w.shard_id, w.fingerprint) not in done]
    if any(shard.groups for shard in todo):  # before the name is taken
        maker.make([cache[next(cache.keys())]])
    claim_artefact(store, KIND, settings)
    for shard in todo:
        maker.commit(shard)
    build_snapshot(store, {w.shard_id: w.fingerprint for w in work})
    return PrefixSummary(
        url=store.url,
        num_shards=len(work),
        num_done_before=len(work) - len(todo),
        num_images=maker.totals["images"],
        num_rejected=maker.totals["rejected"],
        bytes_embeddings=maker.totals["bytes_in"],
        bytes_prefixes=maker.totals["bytes_out"],
    )


@dataclass(kw_only=True)
class _Maker:
    """Makes prefixes, shard by shard."""

    cache: CarvedCache
    store: Store
    settings: Mapping[str, Any]
    fingerprint: str
    codec: Codec
    batch_size: int
    make: Callable[[Sequence[CachedImage]], list[KVPrefix]]
    on_progress: Callable[[int], None]
    totals: Counter[str] = field(default_factory=Counter)

    def work(self) -> list[_Work]:
        """Return the shards of the cache, by id.

        Which rows an equal key hides enters the fingerprint: they have no prefix.
        """
        reader = self.cache.reader
        files = reader.file_records()
        groups: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
        for number, group, rows in zip(*(a.tolist() for a in reader.row_groups()), strict=True):
            groups[files[number]["shard"]].append((number, group, rows))
        found = []
        for shard_id, own in sorted(groups.items()):
            parts = {number: files[number] for number, _, _ in own}
            identity = [
                self.fingerprint,
                [[part["path"], part["sha256"]] for part in parts.values()],
                [[group, rows] for _, group, rows in own],
            ]
            found.append(
                _Work(
                    shard_id=shard_id,
                    fingerprint=layout.fingerprint(identity),
                    groups=[(files[number]["path"], group) for number, group, rows in own if rows],
                    num_bytes=sum(part["size"] for part in parts.values()),
                )
            )
        return found

    def commit(self, work: _Work) -> None:
        """Write one shard's prefixes, and its record last."""
        started, counts = time.time(), Counter[str]()
        rejected: list[RejectedSample] = []
        with ShardWriter(
            store=self.store,
            shard_id=work.shard_id,
            attempt=f"{int(started):x}-{uuid.uuid4().hex[:12]}",
            columns=(),
            metadata={"kind": KIND, "fingerprint": self.fingerprint, "settings": self.settings},
            format_version=rows_version(self.store, layout.ARTEFACT_PATH),
        ) as writer:
            for path, group in work.groups:
                for row in self._rows(path, group, rejected, counts):
                    writer.write(row)
            files = writer.finish(rejected)
        record = Commit(
            shard_id=work.shard_id,
            shard=ShardRef(
                url=work.groups[0][0] if work.groups else "", size=work.num_bytes, etag=""
            ),
            work_fingerprint=work.fingerprint,
            attempt=writer.attempt,
            files=tuple(files),
            num_read=counts["images"],
            num_written=counts["images"] - len(rejected),
            rejected=dict(Counter(sample.reason for sample in rejected)),
            bytes_in=counts["bytes_in"],
            tokens_full=counts["tokens_in"],
            tokens_kept=counts["tokens_out"],
            bytes_tokens=counts["bytes_out"],
            seconds=time.time() - started,
            details={
                "snapshot": self.cache.reader.snapshot.number,
                "settings": self.settings,
                "batch_size": self.batch_size,
                "host": platform.node(),
            },
            committed_at=time.time(),
        )
        try_commit(self.store, record)
        self.totals.update(counts)
        logger.info(
            "shard %s: prefixes of %d images in %.1f s, %d rejected",
            work.shard_id,
            counts["images"],
            record.seconds,
            len(rejected),
        )

    def _rows(
        self, path: str, group: int, rejected: list[RejectedSample], counts: Counter[str]
    ) -> Iterator[RowToWrite]:
        """Yield the prefixes of a row group of the cache, and count them."""
        reader = self.cache.reader
        places = reader.part_rows(path).group(group)
        hashes = reader.read_row_group(places.place(0), ["content_hash"])
        for start in range(0, len(places), self.batch_size):
            batch = places.slice(start, min(start + self.batch_size, len(places)))
            rows = reader.read_in_parallel(batch, self.cache.keep_tokens)
            images = unpack_images(self.cache.codec, rows)
            counts["bytes_in"] += len(rows.tokens) + int(batch.column("aux_length").sum())
            for place, prefix in zip(batch, self.make(images), strict=True):
                reader.check_key(hashes, place)
                counts["images"] += 1
                counts["tokens_in"] += len(prefix.ranks)
                try:
                    packed = pack_prefix(prefix, self.codec)
                except NonFiniteError as err:
                    rejected.append(_rejected(place.key, err))
                    counts["rejected"] += 1
                    continue
                row = _row(place, packed, hashes["content_hash"][place.row].as_py())
                counts["tokens_out"] += row.packed.num_tokens
                counts["bytes_out"] += len(row.packed.tokens) + len(
                    pack_aux(row.packed, positions=row.positions, sizes=row.sizes)
                )
                yield row
            self.on_progress(len(batch))


def _row(place: RowPlace, prefix: PackedPrefix, content_hash: bytes) -> RowToWrite:
    return RowToWrite(
        key=place.key,
        content_hash=content_hash,
        packed=prefix.packed,
        positions=prefix.positions,
        sizes=prefix.sizes,
        grid=(1, 1, prefix.end),
        image_size=(place.width, place.height),
        columns={},
    )


def _rejected(key: str, err: NonFiniteError) -> RejectedSample:
    return RejectedSample(key=key, stage=KIND, reason="non_finite", message=str(err))
