import io
import random
import tarfile
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigError, ShardError, StorageError
from pipeline.source import SourceOptions, expand_shards, read_shard, shard_id
from pipeline.storage import open_store, stat_input
from pipeline.types import RejectedSample, Sample, ShardRef

PARTIAL = SourceOptions(on_truncated="commit_partial")


def archive(*members, format=tarfile.GNU_FORMAT):
    """Build a tar of (name, bytes) pairs and ready-made `TarInfo`s."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def sample(key, image=b"pixels"):
    return [(f"{key}.jpg", image), (f"{key}.json", b"{}")]


def read(data, options=None):
    shard = ShardRef(url="memory://in/shard.tar", size=len(data), etag="")
    return list(read_shard(shard, options, stream=io.BytesIO(data)))


def keys(found):
    return [s.key for s in found if isinstance(s, Sample)]


def rejected(found):
    return [(s.key, s.reason) for s in found if isinstance(s, RejectedSample)]


def without_end(data):
    """Cut an archive just before its end mark."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        last = tar.getmembers()[-1]
    return data[: last.offset_data + last.size + -last.size % 512]


def fails(data, reason, options=None):
    with pytest.raises(ShardError, match=r"memory://in/shard\.tar") as caught:
        read(data, options)
    assert caught.value.reason == reason
    assert caught.value.shard == "memory://in/shard.tar"
    assert "\n" not in str(caught.value)
    return str(caught.value)


# samples


def test_a_sample_is_its_image_and_the_columns_that_were_asked_for():
    found = read(archive(("a/1.JPG", b"pixels"), ("a/1.txt", b"a cat"), ("a/1.xyz", b"no")))

    assert found == [Sample(key="a/1", image=b"pixels", suffix="jpg", columns={"txt": b"a cat"})]


def test_suffixes_are_options():
    options = SourceOptions(image_suffixes=("img.png",), column_suffixes=("caption",))

    found = read(archive(("a.img.png", b"p"), ("a.caption", b"c"), ("a.jpg", b"j")), options)

    assert found == [Sample(key="a", image=b"p", suffix="img.png", columns={"caption": b"c"})]


def test_samples_come_in_the_order_of_the_shard():
    data = archive(*sample("b"), *sample("a"), *sample("c"))

    assert keys(read(data)) == ["b", "a", "c"]


def test_an_archive_without_members_has_no_samples():
    assert read(archive()) == []
    assert read(bytes(1024)) == []


def test_folders_links_and_devices_are_passed_over():
    others = []
    for kind in (
        tarfile.DIRTYPE,
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.FIFOTYPE,
    ):
        info = tarfile.TarInfo("x.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        others.append(info)

    assert read(archive(*others, *sample("a"))) == read(archive(*sample("a")))


@pytest.mark.parametrize(
    "name", ["noext", "__meta__/a.jpg", "__x__", ".hidden", "a.__bad__", "a.__key__"]
)
def test_members_that_belong_to_no_sample_are_passed_over(name):
    found = read(archive((name, b"1"), *sample("b")))

    assert keys(found) == ["b"]
    assert rejected(found) == []


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("key", ["x" * 300, "d/" * 120 + "a", "ключ/图像", "a b\tc"])
def test_long_and_foreign_names_are_read_in_both_ways_they_are_stored(format, key):
    assert keys(read(archive(*sample(key), *sample("b"), format=format))) == [key, "b"]


def test_a_large_size_in_an_extended_header_is_used():
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"size": "6"}
    header = info.tobuf(tarfile.PAX_FORMAT)
    data = header + b"pixels" + bytes(506) + bytes(1024)

    assert read(data)[0].image == b"pixels"


@settings(max_examples=60, deadline=None)
@given(
    files=st.lists(
        st.tuples(
            st.text(
                st.characters(exclude_characters="\0/.", codec="utf-8"), min_size=1, max_size=130
            ),
            st.binary(min_size=1, max_size=1200),
        ),
        unique_by=lambda file: file[0],
        max_size=6,
    ),
    format=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_members_are_read_as_the_standard_library_reads_them(files, format):
    files = [("k" + name, data) for name, data in files]
    data = archive(*[(f"{name}.jpg", content) for name, content in files], format=format)

    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = [(m.name, tar.extractfile(m).read()) for m in tar]
    assert [(f"{s.key}.jpg", s.image) for s in read(data)] == expected


# rejected samples


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.json", b"{}")], "no_image"),
        ([("a.v2.jpg", b"1")], "no_image"),
        ([("a.jpg", b"1"), ("a.png", b"2")], "ambiguous_image"),
        ([("a.jpg", b""), ("a.json", b"{}")], "empty_image"),
    ],
)
def test_a_sample_without_exactly_one_image_is_rejected_alone(members, reason):
    found = read(archive(*sample("0"), *members, *sample("z")))

    assert keys(found) == ["0", "z"]
    assert rejected(found) == [("a", reason)]
    assert found[1].stage == "source"
    assert "memory://in/shard.tar" in found[1].message


def test_the_message_of_a_sample_without_image_tells_what_it_has():
    (found,) = read(archive(("a.v2.jpg", b"1"), ("a.json", b"{}")))

    assert "found: json, v2.jpg" in found.message


@pytest.mark.parametrize("suffix", ["jpg", "json"])
def test_a_member_that_is_too_large_costs_its_sample(suffix):
    options = SourceOptions(max_member_bytes=1000)
    edge, over = ("a.jpg", bytes(1000)), (f"b.{suffix}", bytes(1001))

    found = read(
        archive(edge, ("b.jpg", b"1") if suffix == "json" else ("b.txt", b""), over), options
    )

    assert keys(found) == ["a"]
    assert rejected(found) == [("b", "member_too_large")]


def test_a_large_member_that_is_not_wanted_costs_nothing():
    options = SourceOptions(max_member_bytes=1000)

    assert keys(read(archive(*sample("a"), ("a.npy", bytes(5000))), options)) == ["a"]


def test_memory_is_bounded_by_one_sample(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(
        archive(*[(f"{i}.jpg", bytes(4 << 20)) for i in range(10)], ("x.jpg", bytes(60 << 20)))
    )
    shard = stat_input(str(path))

    tracemalloc.start()
    found = [type(s) for s in read_shard(shard, SourceOptions(max_member_bytes=8 << 20))]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert found == [Sample] * 10 + [RejectedSample]
    assert peak < 40 << 20  # two chunks of 8 MiB and copies of a sample, not 100 MiB


@pytest.mark.parametrize(
    ("members", "used", "refused"),
    [
        ("a.jpg a.jpg b.jpg", ["a", "b"], ["a"]),
        ("a.jpg a.json a.jpg a.json b.jpg", ["a", "b"], ["a"]),
        ("a.jpg b.jpg a.jpg", ["a", "b"], ["a"]),
        ("a.jpg b.jpg a.json b.json", ["a", "b"], ["a", "b"]),
        ("a.json b.json a.jpg b.jpg", [], ["a", "b", "a", "b"]),
        ("a.jpg a.JPG", ["a"], ["a"]),
        ("a.jpg b.jpg a.jpg c.jpg a.jpg", ["a", "b", "c"], ["a", "a"]),
    ],
)
def test_of_groups_of_one_key_only_the_first_can_be_used(members, used, refused):
    found = read(archive(*[(name, b"1") for name in members.split()]))

    assert keys(found) == used
    assert sorted(key for key, _ in rejected(found)) == sorted(refused)
    assert rejected(found)[-1][1] == "duplicate_key"


def test_the_first_of_two_equal_keys_keeps_its_bytes():
    (first, second) = read(archive(("a.jpg", b"first"), ("a.jpg", b"second")))

    assert first.image == b"first"
    assert second.reason == "duplicate_key"


def test_a_name_that_is_not_utf8_is_rejected_with_a_key_that_can_be_stored():
    data = archive(("k\udcff.jpg", b"1"), *sample("b"))

    found = read(data)

    assert keys(found) == ["b"]
    assert rejected(found) == [("k\\udcff", "bad_key")]
    assert found[0].message.encode()


# shards that are cut off


def cuts(data):
    """Give every kind of place: in a header, at its end, in the content, in padding, between."""
    return [*range(100, len(data), 256), *range(512, len(data), 512)]


THREE = archive(*sample("a", b"x" * 700), *sample("b", b"y" * 700), *sample("c", b"z" * 700))
END = len(without_end(THREE))


@pytest.mark.parametrize("cut", [*cuts(THREE[:END]), END, END + 100, END + 512, END + 1000])
def test_a_shard_that_is_cut_off_anywhere_fails_and_says_where(cut):
    message = fails(THREE[:cut], "truncated")

    assert f"at byte {cut} of {cut}" in message


@pytest.mark.parametrize("cut", [*cuts(THREE[:END]), END, END + 100])
def test_of_a_cut_shard_what_is_whole_can_be_used_and_nothing_half(cut):
    whole = {s.key: s for s in read(THREE)}

    found = read(THREE[:cut], PARTIAL)

    assert all(s == whole[s.key] for s in found if isinstance(s, Sample))
    assert keys(found) == ["a", "b", "c"][: len(keys(found))]
    assert [reason for _, reason in rejected(found)] == ["truncated"]
    assert isinstance(found[-1], RejectedSample)
    assert found[-1].key in ({"a", "b", "c"} - set(keys(found))) | {""}


def test_a_cut_inside_the_second_sample_leaves_the_first():
    offset = THREE.index(b"b.jpg")

    found = read(THREE[: offset + 600], PARTIAL)

    assert (keys(found), rejected(found)) == (["a"], [("b", "truncated")])


def test_a_cut_between_members_rejects_the_sample_that_may_lack_some():
    found = read(without_end(THREE), PARTIAL)

    assert (keys(found), rejected(found)) == (["a", "b"], [("c", "truncated")])


@pytest.mark.parametrize("cut", [END + 512, END + 1000])
def test_a_cut_inside_the_end_mark_loses_no_sample(cut):
    found = read(THREE[:cut], PARTIAL)

    assert (keys(found), rejected(found)) == (["a", "b", "c"], [])


def test_a_cut_before_any_name_is_reported_without_a_key():
    assert rejected(read(THREE[:100], PARTIAL)) == [("", "truncated")]


@pytest.mark.parametrize("options", [None, PARTIAL])
def test_a_file_without_bytes_is_no_shard(options):
    fails(b"", "empty", options)


# shards that are damaged


@pytest.mark.parametrize("options", [None, PARTIAL])
@pytest.mark.parametrize("place", [0, 100, 124, 148, 300])
def test_a_damaged_header_fails_wherever_it_is(place, options):
    offset = THREE.index(b"b.jpg")
    data = bytearray(THREE)
    data[offset + place] ^= 0x15

    message = fails(bytes(data), "corrupt_header", options)

    assert f"at byte {offset} of" in message


def test_a_header_overwritten_with_zeros_is_not_the_end():
    offset = THREE.index(b"b.jpg")

    fails(THREE[:offset] + bytes(512) + THREE[offset + 512 :], "corrupt_header")


def test_members_after_the_end_are_not_lost_in_silence():
    message = fails(THREE + THREE, "trailing_data")

    assert "joined archives" in message


@pytest.mark.parametrize("data", [b"\x1f\x8b" + bytes(2000), b"text" * 500, b"BZh9" * 400])
def test_a_file_that_is_no_tar_is_not_opened_as_anything_else(data):
    fails(data, "corrupt_header")


def extended(kind, body, claimed=None):
    info = tarfile.TarInfo("header")
    info.type, info.size = kind, len(body) if claimed is None else claimed
    return info.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_an_extended_header_that_claims_gigabytes_is_refused_unread(kind):
    fails(extended(kind, b"", claimed=7 << 30) + archive(*sample("a")), "corrupt_header")


@pytest.mark.parametrize(
    "body",
    [
        b"999 path=a\n",
        b"1 path=a.jpg\n",
        b"0 a=b\n",
        b"13 path=a.jpgX",
        b"junk",
        b"13 size=hello\n",
    ],
)
def test_a_damaged_extended_header_is_an_error(body):
    fails(extended(tarfile.XHDTYPE, body) + archive(*sample("a")), "corrupt_header")


def test_ten_thousand_extended_headers_in_a_row_are_no_danger():
    header = extended(tarfile.XHDTYPE, b"13 mtime=123\n")

    assert keys(read(header * 10_000 + archive(*sample("a")))) == ["a"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((tarfile.XHDTYPE, b"14 path=x.jpg\n"), (tarfile.XHDTYPE, b"14 path=y.jpg\n")),
        ((tarfile.XHDTYPE, b"9 size=1\n"), (tarfile.SOLARIS_XHDTYPE, b"9 size=2\n")),
        ((tarfile.GNUTYPE_LONGNAME, b"x.jpg"), (tarfile.GNUTYPE_LONGNAME, b"y.jpg")),
        ((tarfile.GNUTYPE_LONGNAME, b"x.jpg"), (tarfile.XHDTYPE, b"14 path=y.jpg\n")),
    ],
)
def test_two_extended_headers_that_disagree_are_an_error(first, second):
    message = fails(extended(*first) + extended(*second) + archive(*sample("a")), "corrupt_header")

    assert "two extended headers" in message


def test_a_global_header_counts_from_the_next_member_on():
    data = extended(tarfile.XGLTYPE, b"14 path=b.jpg\n") + archive(("a.jpg", b"1"))

    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert tar.getnames() == ["b.jpg"]
    assert keys(read(data)) == ["b"]


def test_a_member_continued_from_another_volume_is_refused():
    info = tarfile.TarInfo("a.jpg")
    info.type = b"M"

    message = fails(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024), "unsupported_member")

    assert "'a.jpg' is continued from another volume" in message


def test_an_extended_header_at_the_end_is_an_error():
    fails(
        without_end(THREE) + extended(tarfile.XHDTYPE, b"13 mtime=123\n") + bytes(1024),
        "corrupt_header",
    )


def test_a_sparse_member_is_refused_by_name():
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}

    message = fails(info.tobuf(tarfile.PAX_FORMAT) + bytes(1024), "unsupported_member")

    assert "'a.jpg' is sparse" in message


def outcome(data):
    try:
        found = read(data)
    except ShardError as err:
        return err.reason
    return len(found)


@settings(max_examples=300, deadline=None)
@given(
    flips=st.lists(st.tuples(st.integers(0, len(THREE) - 1), st.integers(1, 255)), max_size=6),
    end=st.integers(0, len(THREE)),
)
def test_damaged_bytes_give_samples_or_a_shard_error(flips, end):
    data = bytearray(THREE)
    for place, mask in flips:
        data[place] ^= mask

    assert outcome(bytes(data[:end])) in {
        *range(7),
        "empty",
        "truncated",
        "corrupt_header",
        "trailing_data",
        "unsupported_member",
    }


def test_no_single_flipped_bit_of_a_header_changes_the_samples_in_silence():
    with tarfile.open(fileobj=io.BytesIO(THREE)) as tar:
        headers = [member.offset for member in tar]
    places = [h + i for h in headers for i in random.Random(0).sample(range(512), 40)]

    for place in places:
        data = bytearray(THREE)
        data[place] ^= 1
        assert outcome(bytes(data)) in {"corrupt_header", "truncated"}


# from a store


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path))


def test_a_shard_is_read_from_its_store_and_verified_against_the_listing(store):
    store.put("x.tar", THREE)
    (shard,) = expand_shards(store.url_of("x.tar"))

    assert keys(read_shard(shard)) == ["a", "b", "c"]
    store.put("x.tar", archive(*sample("other")))
    with pytest.raises(StorageError, match="changed since it was listed"):
        list(read_shard(shard))


# which shards


@pytest.fixture
def shards(store):
    for path in ("in/s-00.tar", "in/s-01.tar", "in/s-02.tar", "other/s-00.tar", "in/notes.json"):
        store.put(path, archive(*sample(path)))
    return store


def found(store, *specs):
    refs = expand_shards([store.url_of(spec) for spec in specs])
    return [ref.url.removeprefix(f"{store.url}/") for ref in refs]


@pytest.mark.parametrize(
    "spec", ["in", "in/", "in/s-{00..02}.tar", "in/*.tar", "in/s-0?.tar", "in/s-[0-9][0-9].tar"]
)
def test_shards_are_named_in_many_ways(shards, spec):
    assert found(shards, spec) == ["in/s-00.tar", "in/s-01.tar", "in/s-02.tar"]


def test_several_specifications_are_joined_sorted_and_without_repetition(shards):
    specs = ["other", "in/s-01.tar", "in/*1.tar", "in/s-{00,01}.tar"]

    assert found(shards, *specs) == ["in/s-00.tar", "in/s-01.tar", "other/s-00.tar"]


def test_a_shard_comes_with_size_and_etag(shards):
    (shard,) = expand_shards(shards.url_of("in/s-00.tar"))

    assert shard == stat_input(shards.url_of("in/s-00.tar"))
    assert shard.size == shards.size("in/s-00.tar")
    assert shard.etag


@pytest.mark.parametrize("name", ["list.txt", "shards.list"])
def test_a_text_file_lists_shards_relative_to_itself(shards, name):
    lines = ["# a comment", "", "in/s-{00..01}.tar ", shards.url_of("other/s-00.tar")]
    shards.put(name, "\n".join(lines).encode())

    assert found(shards, name) == ["in/s-00.tar", "in/s-01.tar", "other/s-00.tar"]


def test_shards_of_a_store_in_memory_keep_their_url():
    open_store("memory://corpus").put("x.tar", THREE)

    assert [s.url for s in expand_shards("memory://corpus/*.tar")] == ["memory://corpus/x.tar"]
    assert [s.url for s in expand_shards("memory://corpus")] == ["memory://corpus/x.tar"]
    assert keys(read_shard(expand_shards("memory://corpus/x.tar")[0])) == ["a", "b", "c"]


def test_everything_that_is_missing_is_reported_at_once(shards):
    with pytest.raises(ConfigError) as caught:
        found(shards, "in/s-{01..03}.tar", "nowhere", "in/x*.tar", "other/s-00.tar")

    assert all(name in str(caught.value) for name in ("s-03.tar", "nowhere", "x*.tar"))
    assert "s-02.tar" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "content", "message"),
    [
        ("missing.txt", None, "does not exist"),
        ("empty.txt", b"# nothing\n\n", "names none"),
        ("binary.txt", b"\xff\xfe\0", "not UTF-8"),
        ("nested.txt", b"more.txt\n", "names another list"),
        ("in/{00..02.tar", None, "unbalanced braces"),
        ("no-tars", None, "no shards found"),
    ],
)
def test_a_specification_that_cannot_be_used_is_a_configuration_error(
    store, spec, content, message
):
    store.put("no-tars/readme.md", b"")
    store.put("any" if content is None else spec, content or b"")

    with pytest.raises(ConfigError, match=message):
        found(store, spec)


def test_no_specification_is_a_configuration_error():
    with pytest.raises(ConfigError, match="the list of inputs is empty"):
        expand_shards([])


def test_the_id_of_a_shard_is_readable_safe_unique_and_stable():
    one, two, odd = (
        ShardRef(url=url, size=1, etag="")
        for url in ("s3://b/one/train-000.tar", "s3://b/two/train-000.tar", "s3://b/ü /../..tar")
    )

    assert shard_id(one).startswith("train-000-")
    assert shard_id(one) != shard_id(two)
    assert shard_id(one) == "train-000-" + shard_id(one)[-12:]
    assert all(c.isascii() and (c.isalnum() or c in "-_") for c in shard_id(odd))


@pytest.mark.parametrize(
    "options",
    [
        {"image_suffixes": ()},
        {"image_suffixes": (".jpg",)},
        {"image_suffixes": ("JPG",)},
        {"column_suffixes": ("jpg",)},
        {"column_suffixes": ("__key__",)},
        {"max_member_bytes": 0},
        {"on_truncated": "ignore"},
    ],
)
def test_options_are_checked(options):
    with pytest.raises(ConfigError):
        SourceOptions(**options)
