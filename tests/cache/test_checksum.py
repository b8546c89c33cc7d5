import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cache.checksum import crc32c, joined_crc32c


@given(data=st.binary(max_size=300), cut=st.integers(0, 300))
def test_it_is_the_checksum_of_rfc_3720(data: bytes, cut: int) -> None:
    assert crc32c(data) == google_crc32c.value(data)
    assert crc32c(data[cut:], crc32c(data[:cut])) == google_crc32c.value(data)


@given(
    block_bytes=st.integers(1, 40),
    runs=st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 63, 64, 65, 66, 129]), st.integers(1, 40)),
        min_size=1,
        max_size=6,
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_checksums_of_blocks_give_those_of_their_runs(
    block_bytes: int, runs: list[tuple[int, int]], seed: int
) -> None:
    check_runs(block_bytes, [(count, min(last, block_bytes)) for count, last in runs], seed)


@pytest.mark.parametrize(
    ("block_bytes", "runs"),
    [
        (16 * 1024, [(8, 16 * 1024), (1, 1), (12, 1024)]),
        (3, [(64 * 64 + 1, 3), (64 * 64 + 2, 2), (1, 3)]),  # groups of groups of blocks
    ],
)
def test_checksums_of_large_blocks_and_of_many(
    block_bytes: int, runs: list[tuple[int, int]]
) -> None:
    check_runs(block_bytes, runs, seed=0)


def check_runs(block_bytes: int, runs: list[tuple[int, int]], seed: int) -> None:
    """Compare what is worked out with what the bytes say, for (blocks, bytes of the last)."""
    random = np.random.default_rng(seed)
    contents = [random.bytes((count - 1) * block_bytes + last) for count, last in runs]
    sums = [
        google_crc32c.value(content[start : start + block_bytes])
        for content in contents
        for start in range(0, len(content), block_bytes)
    ]

    found = joined_crc32c(
        np.array(sums, np.uint32),
        np.array([count for count, _ in runs], np.int64),
        block_bytes=block_bytes,
        last_bytes=np.array([last for _, last in runs], np.int64),
    )

    assert found.tolist() == [google_crc32c.value(content) for content in contents]
