"""What `loaders.py` reads: the same random rows for every loader, made anew from their number."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

WIDTH = 1024
GRID = 24  # 24 x 24 places, of which the kept tokens are a sample
ROWS_PER_SHARD = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One image's tokens as a codec with a scale per token stores them."""

    key: str
    codes: NDArray[np.int8]  # (K, D)
    scales: NDArray[np.float32]  # (K,), positive
    positions: NDArray[np.uint32]  # (K,)
    sizes: NDArray[np.float32]  # (K,)

    @property
    def aux(self) -> bytes:
        """Scales, positions and sizes one after the other: 12 bytes a token."""
        return self.scales.tobytes() + self.positions.tobytes() + self.sizes.tobytes()


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """A data set: so many rows, all of the same number of tokens or not."""

    name: str
    num_rows: int
    fewest_tokens: int
    most_tokens: int
    seed: int = 0

    @property
    def is_rectangular(self) -> bool:
        """Whether every row has the same number of tokens."""
        return self.fewest_tokens == self.most_tokens

    @property
    def num_shards(self) -> int:
        """Files or shards that a loader's data is cut into: at least one for each worker."""
        return max(4, -(-self.num_rows // ROWS_PER_SHARD))

    def keys(self) -> list[str]:
        """Return all keys, in the order of storage."""
        return [self._key(number) for number in range(self.num_rows)]

    def shards(self) -> list[range]:
        """Return the numbers of the rows of each shard."""
        cuts = np.linspace(0, self.num_rows, self.num_shards + 1).astype(int).tolist()
        return [range(start, stop) for start, stop in pairwise(cuts)]

    def row(self, number: int) -> Row:
        """Make one row."""
        rng = np.random.default_rng([self.seed, number])
        count = int(rng.integers(self.fewest_tokens, self.most_tokens + 1))
        return Row(
            key=self._key(number),
            codes=np.frombuffer(rng.bytes(count * WIDTH), np.int8).reshape(count, WIDTH),
            scales=rng.uniform(0.001, 0.1, count).astype(np.float32),
            positions=rng.permutation(GRID * GRID)[:count].astype(np.uint32),
            sizes=rng.integers(1, 9, count).astype(np.float32),
        )

    def rows(self) -> Iterator[Row]:
        """Make all rows, in the order of storage."""
        return map(self.row, range(self.num_rows))

    def number_of(self, key: str) -> int:
        """Return the number of the row with a key."""
        return int(key.rsplit("-", 1)[1])

    def _key(self, number: int) -> str:
        return f"{number * self.num_shards // self.num_rows:05d}-{number:08d}"


def corpora(num_rows: int) -> dict[str, Corpus]:
    """Return the data sets by name."""
    return {
        "fixed": Corpus(name="fixed", num_rows=num_rows, fewest_tokens=128, most_tokens=128),
        "ragged": Corpus(name="ragged", num_rows=num_rows, fewest_tokens=32, most_tokens=192),
    }
