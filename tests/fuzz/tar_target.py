"""The tar reader, against Python's own."""

import io
import tarfile
from dataclasses import dataclass
from random import Random

from pipeline.errors import ShardError
from pipeline.source import SourceOptions, read_shard
from pipeline.types import Sample, ShardRef
from tests.fuzz.mutation import damage
from tests.fuzz.target import BrokenPromiseError, Target

_FIELDS = (  # of a header: start and length
    *((0, 100), (100, 8), (108, 8), (116, 8), (124, 12), (124, 12), (136, 12), (156, 1), (156, 1)),
    *((157, 100), (257, 8), (345, 155)),
)
_TYPES = b"0\0" + b"1234567" + b"gxXLKSDNMVA"
_SIZES = (0, 1, 511, 512, 513, 1024, 2**20, 2**33 - 1)
_OPTIONS = (
    SourceOptions(),
    SourceOptions(on_truncated="commit_partial"),
    SourceOptions(max_member_bytes=600),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Archive:
    data: bytes
    options: SourceOptions


class TarTarget(Target):
    name = "tar"

    def __init__(self) -> None:
        formats = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
        self.seeds = [_archive(number, kind) for number, kind in enumerate(formats)]

    def mutated(self, random: Random) -> Archive:
        data = random.choice(self.seeds)
        if random.random() < 0.6:
            for _ in range(random.choice((1, 1, 2, 3))):
                data = random.choice((_change_field, _change_field, _change_blocks, _change_pax))(
                    data, random
                )
        else:
            data = damage(data, random, others=self.seeds)
        return Archive(data=data, options=random.choice(_OPTIONS))

    def check(self, made: Archive) -> str:
        shard = ShardRef(url="memory://fuzz.tar", size=len(made.data), etag="")
        found: list = []
        outcome = "read"
        try:
            for sample in read_shard(shard, made.options, stream=io.BytesIO(made.data)):
                found.append(sample)
        except ShardError as err:
            outcome = err.reason
        members = _members(made.data)
        for sample in found:
            if isinstance(sample, Sample) and members is not None:
                _check_sample(sample, members)
        if outcome == "read" and members is None:
            outcome = "read, tarfile refuses"
        return outcome


def _check_sample(sample: Sample, members: set[tuple[str, bytes]]) -> None:
    for suffix, data in ((sample.suffix, sample.image), *sample.columns.items()):
        if (f"{sample.key}.{suffix}", data) not in members:
            raise BrokenPromiseError(
                f"sample {sample.key!r} has {len(data)} bytes of .{suffix} that are no member"
            )


def _members(data: bytes) -> set[tuple[str, bytes]] | None:
    """Return name and bytes of the regular files as tarfile reads them; None where it does not."""
    found = set()
    try:
        with tarfile.open(
            fileobj=io.BytesIO(data), mode="r:", encoding="utf-8", errors="surrogateescape"
        ) as tar:
            for member in tar:
                is_file = member.isreg() or member.type not in tarfile.SUPPORTED_TYPES
                if is_file and not member.issparse():
                    content = tar.extractfile(member)
                    key, dot, suffix = member.name.rpartition(".")
                    name = f"{key}{dot}{suffix.lower()}"
                    found.add((name, b"" if content is None else content.read()))
    except Exception:  # noqa: BLE001  (tarfile raises what it likes on damaged archives)
        return None
    return found


def _archive(number: int, kind: int) -> bytes:
    sink = io.BytesIO()
    random = Random(number)
    with tarfile.open(fileobj=sink, mode="w", format=kind) as tar:
        for place in range(5):
            key = f"d{place}/" + "long" * 15 + f"-{place}" if place % 2 else f"k{place}"
            if kind != tarfile.USTAR_FORMAT and place == 3:
                key += "-ключ" * 20
            for suffix, size in (("jpg", 100 + 300 * place), ("txt", 20), ("npy", 700)):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = size
                tar.addfile(info, io.BytesIO(random.randbytes(size)))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return sink.getvalue()[: (sink.tell() // 512) * 512]


def _headers(data: bytes) -> list[int]:
    """Return where blocks begin that look like headers."""
    return [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]


def _change_field(data: bytes, random: Random) -> bytes:
    """Change one field of a header, mostly with its checksum made anew."""
    starts = _headers(data)
    if not starts:
        return damage(data, random)
    at = random.choice(starts)
    block = bytearray(data[at : at + 512])
    start, length = random.choice(_FIELDS)
    block[start : start + length] = _field(start, length, random)
    if random.random() < 0.9:
        block[148:156] = b" " * 8
        block[148:156] = f"{sum(block):06o}\0 ".encode()
    return data[:at] + bytes(block) + data[at + 512 :]


def _field(start: int, length: int, random: Random) -> bytes:
    if start == 156:
        return bytes([random.choice(_TYPES)])
    choice = random.randrange(4)
    if choice == 0:
        return random.randbytes(length)
    if choice == 1:
        names = ("../../x.jpg", "/abs.jpg", "a//b.jpg", "c\\d.jpg", "k0.jpg", ".jpg", "k\0.jpg", "")
        return random.choice(names).encode()[:length].ljust(length, b"\0")
    if choice == 2:
        digits = f"{random.choice(_SIZES):0{length - 1}o}"[-(length - 1) :] if length > 1 else "0"
        return digits.encode().ljust(length, b"\0")
    number = random.choice((-1, 1, 2**40, 2**62)) % (1 << 8 * (length - 1)) if length > 1 else 0
    return (b"\x80" + number.to_bytes(length - 1, "big"))[:length] if length > 1 else b"\x80"


def _change_blocks(data: bytes, random: Random) -> bytes:
    """Remove, repeat, move or clear whole blocks."""
    blocks = [data[at : at + 512] for at in range(0, len(data), 512)]
    if len(blocks) < 3:
        return damage(data, random)
    at, to = random.randrange(len(blocks)), random.randrange(len(blocks))
    count = random.choice((1, 1, 2, 5))
    taken = blocks[at : at + count]
    choice = random.randrange(4)
    if choice == 0:
        del blocks[at : at + count]
    elif choice == 1:
        blocks[to:to] = taken
    elif choice == 2:
        blocks[to : to + len(taken)] = taken
    else:
        blocks[at : at + count] = [bytes(512)] * len(taken)
    return b"".join(blocks)


def _change_pax(data: bytes, random: Random) -> bytes:
    """Put an extended header of odd records before a header."""
    starts = _headers(data)
    if not starts:
        return damage(data, random)
    record = random.choice(
        (
            b"path=../../../etc/x.jpg",
            b"path=" + b"n" * 3000 + b".jpg",
            b"path=\xff\xfe.jpg",
            b"size=" + str(random.choice((*_SIZES, 10**18, -5))).encode(),
            b"size=0x10",
            b"GNU.sparse.map=0,1",
            b"hdrcharset=BINARY",
            b"path=",
            b"path=a\0b.jpg",
        )
    )
    length = len(record) + 3
    while len(str(length)) + 2 + len(record) != length:
        length = len(str(length)) + 2 + len(record)
    body = f"{length} ".encode() + record + b"\n"
    if random.random() < 0.2:
        body = damage(body, random)
    info = tarfile.TarInfo("pax")
    info.type = random.choice((tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE))
    if random.random() < 0.2:
        info.type = random.choice((tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK))
        body = record
    info.size = len(body)
    extra = info.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512)
    at = random.choice(starts)
    return data[:at] + extra + data[at:]
