"""Archives built to cost memory, to reach outside, or to run something."""

import io
import os
import pickle
import tarfile
import tracemalloc
import unicodedata
from collections.abc import Iterator

import pytest

from pipeline.cache import layout
from pipeline.errors import ShardError
from pipeline.source import SourceOptions, read_shard, shard_id
from pipeline.types import RejectedSample, Sample, ShardRef
from tests.test_source import archive, keys, read, rejected

BLOCK = 512


class Generated:
    """A stream of an archive that exists nowhere: one header after another, and zeros."""

    def __init__(self, pieces: Iterator[bytes | int]) -> None:
        self.pieces, self.rest, self.num_zeros, self.position = pieces, b"", 0, 0

    def read(self, length: int, /) -> bytes:
        found = bytearray()
        while len(found) < length:
            if self.num_zeros:
                count = min(self.num_zeros, length - len(found))
                found += bytes(count)
                self.num_zeros -= count
            elif self.rest:
                count = min(len(self.rest), length - len(found))
                found += self.rest[:count]
                self.rest = self.rest[count:]
            else:
                piece = next(self.pieces, None)
                if piece is None:
                    break
                self.num_zeros, self.rest = (piece, b"") if isinstance(piece, int) else (0, piece)
        self.position += len(found)
        return bytes(found)


def header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def stream_of(members: Iterator[tuple[str, int]]) -> Iterator[bytes | int]:
    for name, size in members:
        yield header(name, size)
        yield size + -size % BLOCK
    yield 2 * BLOCK


def read_generated(members: Iterator[tuple[str, int]], total: int, **options: object) -> Iterator:
    shard = ShardRef(url="memory://in/generated.tar", size=total, etag="")
    stream = Generated(stream_of(members))
    return read_shard(shard, SourceOptions(**options), stream=stream)


def peak_of(action) -> int:
    tracemalloc.start()
    action()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


def check_many_members(count: int) -> None:
    found = 0
    total = count * 2 * BLOCK + 2 * BLOCK

    def read_all() -> None:
        nonlocal found
        for sample in read_generated(((f"{n}.jpg", 9) for n in range(count)), total):
            assert isinstance(sample, Sample)
            found += 1

    peak = peak_of(read_all)

    assert found == count
    assert peak < (8 << 20) + 200 * count  # keys, so that none occurs twice, and nothing else


def test_of_an_archive_of_many_members_only_the_keys_stay() -> None:
    check_many_members(3_000)


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
def test_of_an_archive_of_a_million_members_only_the_keys_stay() -> None:
    check_many_members(1_000_000)


def check_large_member(size: int) -> None:
    found = []
    members = [("a.jpg", 9), ("big.jpg", size), ("b.jpg", 9)]
    total = sum(BLOCK + s + -s % BLOCK for _, s in members) + 2 * BLOCK

    peak = peak_of(lambda: found.extend(read_generated(iter(members), total)))

    assert keys(found) == ["a", "b"]
    assert rejected(found) == [("big", "member_too_large")]
    assert f"{size} bytes exceeds max_member_bytes" in found[1].message
    assert peak < 16 << 20


@pytest.mark.parametrize("size", [129 << 20, 300 << 20])
def test_a_member_above_the_limit_is_skipped_piece_by_piece(size: int) -> None:
    check_large_member(size)


@pytest.mark.fuzz
@pytest.mark.timeout(3600)
def test_a_member_of_two_gigabytes_is_skipped_piece_by_piece() -> None:
    check_large_member(2 << 30)


@pytest.mark.parametrize("size", [8 << 30, (1 << 62)])
def test_a_member_that_claims_more_than_there_is_is_a_cut(size: int) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.size = size
    data = info.tobuf(tarfile.GNU_FORMAT) + bytes(2 * BLOCK)

    with pytest.raises(ShardError) as caught:
        read(data)

    assert caught.value.reason == "truncated"


@pytest.mark.parametrize(
    "key",
    [
        "../../x",
        "/etc/passwd",
        "/abs/../../x",
        "a//b",
        "a/./b",
        "C:\\windows\\x",
        "c\\x",
        "~root/x",
        "-rf",
        "a\nb",
        "a\tb\x1b[31m",
        "CON",
        "n" * 4000,
        "d/" * 2000 + "x",
    ],
)
def test_a_key_is_only_text_and_names_no_file(key: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir(tmp_path.parent))

    found = read(archive((f"{key}.jpg", b"1"), ("b.jpg", b"2"), format=tarfile.PAX_FORMAT))

    assert keys(found) == [key, "b"]
    assert list(tmp_path.iterdir()) == []
    assert sorted(os.listdir(tmp_path.parent)) == before


def test_a_name_ends_at_its_first_nul_byte() -> None:
    block = bytearray(header("k.jpg", 1))
    block[5:12] = b"\0/../../"[:7]
    block[148:156] = b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()

    found = read(bytes(block) + b"1" + bytes(511) + bytes(1024))

    assert keys(found) == ["k"]


def test_keys_that_differ_in_case_or_normal_form_stay_apart() -> None:
    composed = unicodedata.normalize("NFC", "caf\u00e9")
    decomposed = unicodedata.normalize("NFD", composed)
    names = ["key", "KEY", "Key", composed, decomposed, "k\u200bey", "\u212aey"]

    found = read(archive(*[(f"{n}.jpg", n.encode()) for n in names]))

    assert keys(found) == names
    assert [s.image.decode() for s in found] == names


def test_shards_that_differ_in_case_or_normal_form_have_other_ids() -> None:
    composed = unicodedata.normalize("NFC", "caf\u00e9")
    names = ["s", "S", composed, unicodedata.normalize("NFD", composed), "a/s", "s%2F", "s.tar.tar"]
    shards = [ShardRef(url=f"s3://b/{name}.tar", size=1, etag="") for name in names]

    ids = [shard_id(shard) for shard in shards]

    # Also where a file system takes upper and lower case for the same.
    assert len({i.lower() for i in ids}) == len(ids)
    for i in ids:
        assert layout.parse_part_path(layout.part_path(i, "attempt", 0)) is not None


class Payload:
    """Makes a file where it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (open, (self.path, "w"))


@pytest.mark.parametrize(
    "suffix", ["pkl", "pickle", "pth", "pt", "pyd", "npy", "npz", "dill", "ten"]
)
@pytest.mark.parametrize("column", [False, True])
def test_pickled_members_are_never_loaded(suffix: str, column: bool, tmp_path) -> None:
    proof = tmp_path / "proof"
    content = pickle.dumps(Payload(str(proof)))
    options = SourceOptions(column_suffixes=("json", suffix) if column else ("json",))

    (found,) = read(archive(("a.jpg", b"1"), (f"a.{suffix}", content)), options)

    assert found.columns == ({suffix: content} if column else {})
    assert not proof.exists()
    pickle.loads(content).close()
    assert proof.exists()  # it would have


def test_compressed_members_stay_compressed() -> None:
    import gzip

    bomb = gzip.compress(bytes(10 << 20))
    options = SourceOptions(image_suffixes=("jpg", "jpg.gz"), column_suffixes=("json.gz",))

    found = read(archive(("a.jpg.gz", bomb), ("a.json.gz", bomb)), options)

    assert (found[0].image, found[0].columns) == (bomb, {"json.gz": bomb})


def test_links_and_devices_give_neither_samples_nor_files() -> None:
    others = []
    for kind, name in (
        (tarfile.SYMTYPE, "a.jpg"),
        (tarfile.LNKTYPE, "b.jpg"),
        (tarfile.CHRTYPE, "c.jpg"),
        (tarfile.BLKTYPE, "d.jpg"),
        (tarfile.FIFOTYPE, "e.jpg"),
        (tarfile.DIRTYPE, "f.jpg"),
    ):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        others.append(info)

    assert read(archive(*others)) == []


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_name_of_half_a_megabyte_is_a_key_and_one_of_two_is_refused(kind: int) -> None:
    assert keys(read(archive(("n" * 500_000 + ".jpg", b"1"), format=kind))) == ["n" * 500_000]
    with pytest.raises(ShardError, match="extended header claims"):
        read(archive(("n" * 2_000_000 + ".jpg", b"1"), format=kind))


def test_old_sparse_members_are_refused() -> None:
    info = tarfile.TarInfo("a.jpg")
    info.type = tarfile.GNUTYPE_SPARSE

    with pytest.raises(ShardError) as caught:
        read(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))

    assert caught.value.reason == "unsupported_member"


def test_messages_of_hostile_names_are_one_line_that_can_be_stored() -> None:
    found = read(archive(("a\nb\x1b[2J.txt", b"1"), ("\udcff\n.jpg", b"1")))

    assert all(isinstance(s, RejectedSample) for s in found)
    for sample in found:
        sample.message.encode()
        assert io.StringIO(sample.message).readlines() == [sample.message]
