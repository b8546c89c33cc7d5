"""A JSON record that was changed is refused, whatever it was changed to."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cache import layout
from pipeline.cache.commit import read_identity
from pipeline.cache.record import dump_record, parse_record
from pipeline.errors import CacheFormatError
from pipeline.storage import open_store
from tests.cache.rows import IDENTITY, SETTINGS

VALUES = {"options": {"seed": 7, "share": 0.25, "of": None}, "text": "ключ", "n": [1]}
WHOLE = dump_record(VALUES)


def test_a_record_comes_back_as_it_was() -> None:
    assert parse_record(WHOLE, where="here") == VALUES


def test_a_record_of_before_there_were_checksums_is_read() -> None:
    old = layout.dump_json({"format_version": 1, **VALUES})

    assert parse_record(old, where="here") == VALUES


@given(place=st.integers(0, len(WHOLE) - 1), mask=st.integers(1, 255))
def test_a_changed_byte_is_refused_or_changes_nothing(place: int, mask: int) -> None:
    content = bytearray(WHOLE)
    content[place] ^= mask

    try:
        found = parse_record(bytes(content), where="here")
    except CacheFormatError:
        return
    found = {name: value for name, value in found.items() if name in VALUES}
    assert found == VALUES  # the name of the checksum itself was changed


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b"\xff\xfe",
        b'{"format_version":1,"n":NaN}',
        b'{"format_version":1,"n":' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"format_version":1,"checksum":"","text":"\\ud800"}',
        b'{"format_version":[1]}',
    ],
)
def test_what_is_no_record_is_refused_in_one_line(content: bytes) -> None:
    with pytest.raises(CacheFormatError, match="here") as caught:
        parse_record(content, where="here")

    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_another_version_asks_for_a_newer_package() -> None:
    with pytest.raises(CacheFormatError, match="format version 2 is not known; install a newer"):
        parse_record(json.dumps({"format_version": 2}).encode(), where="here")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {**SETTINGS, "encoder": {"name": 7}},
        {**SETTINGS, "codec": "int8"},
        {**SETTINGS, "width": 0},
    ],
)
def test_an_identity_that_is_none_is_refused_for_all_its_checksum(settings, tmp_path) -> None:
    store = open_store(str(tmp_path))
    store.put("carve.json", dump_record({**IDENTITY, "settings": settings}))

    with pytest.raises(CacheFormatError, match=r"carve\.json is damaged: settings"):
        read_identity(store)
