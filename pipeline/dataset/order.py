"""The order of one epoch: where the row at any position of it lies, without a list of all rows."""

from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class EpochOrder:
    """A permutation of the rows of a cache, known by seed, epoch and shape alone.

    Row groups are permuted, and the rows in that order are cut into `lanes` runs of equal length,
    give or take one row. In each lane, `window` rows after another are permuted. An epoch takes
    `lane_rows` rows of each lane in turn, then the next of each; what is left of the lanes at the
    end comes lane after lane. Who reads how much of it, and when, changes nothing.

    Memory is 24 bytes a row group, and 8 a row of two windows of each lane.

    Attributes:
        sizes: rows of each row group.
        seed: of the permutations.
        epoch: likewise.
        shuffle: False for the order of storage, in one lane.
        window: rows that are permuted together; a multiple of `lane_rows`.
        lanes: see above; so many readers that take turns of `lane_rows` rows share no window.
        lane_rows: see above.
    """

    sizes: Numbers
    seed: int
    epoch: int
    shuffle: bool
    window: int
    lanes: int = 1
    lane_rows: int = 1

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def rows(self, positions: Numbers) -> tuple[Numbers, Numbers]:
        """Return the row group, and the row within it, at each position of the epoch.

        Args:
            positions: in [0, len(self)).
        """
        places = self._shuffled(positions) if self.shuffle else positions
        number = np.searchsorted(self._ends, places, side="right")
        groups = self._order[number]
        return groups, places - (self._ends[number] - self.sizes[groups])

    def boundaries(self, positions: Numbers) -> Numbers:
        """Return a number for each position that is the same for rows that lie together.

        They are of one window of each lane, or, in the order of storage, of one row group.
        """
        if self.shuffle:
            return positions // (self.window * self.lanes)
        return np.searchsorted(self._ends, positions, side="right")

    @cached_property
    def _order(self) -> Numbers:
        """The permuted row groups."""
        count = len(self.sizes)
        if not self.shuffle:
            return np.arange(count)
        return np.random.default_rng([self.seed, self.epoch]).permutation(count)

    @cached_property
    def _ends(self) -> Numbers:
        """Rows before the end of each permuted row group."""
        return np.cumsum(self.sizes[self._order])

    @cached_property
    def _lane_starts(self) -> Numbers:
        """(lanes + 1,) at which row lanes begin, and the end of the last."""
        return np.arange(self.lanes + 1) * len(self) // self.lanes

    @cached_property
    def _recent(self) -> OrderedDict[tuple[int, int], Numbers]:
        """The permutations of the windows used last."""
        return OrderedDict()

    def _shuffled(self, positions: Numbers) -> Numbers:
        """Return which row of the permuted row groups comes at each position."""
        lane, row = self._in_lanes(positions)
        window, place = np.divmod(row, self.window)
        found = np.empty_like(positions)
        both = lane << 32 | window
        for mark in np.unique(both).tolist():
            mine = both == mark
            found[mine] = self._permuted(mark >> 32, mark & 0xFFFFFFFF)[place[mine]]
        return found

    def _in_lanes(self, positions: Numbers) -> tuple[Numbers, Numbers]:
        """Return the lane of each position, and the number of its row in the lane."""
        if self.lanes == 1:
            return np.zeros_like(positions), positions
        lengths = np.diff(self._lane_starts)
        turns = int(lengths.min()) // self.lane_rows
        turn, rest = np.divmod(positions, self.lane_rows * self.lanes)
        lane, row = np.divmod(rest, self.lane_rows)
        # What is left of each lane, one after the other.
        left = np.cumsum(lengths - turns * self.lane_rows)
        late = positions - turns * self.lane_rows * self.lanes
        last = np.minimum(np.searchsorted(left, late, side="right"), self.lanes - 1)
        is_early = late < 0
        return (
            np.where(is_early, lane, last),
            np.where(is_early, turn * self.lane_rows + row, lengths[last] - (left[last] - late)),
        )

    def _permuted(self, lane: int, window: int) -> Numbers:
        """Return the rows of a window in the order they are given."""
        order = self._recent.get((lane, window))
        if order is None:
            start = int(self._lane_starts[lane]) + window * self.window
            stop = min(start + self.window, int(self._lane_starts[lane + 1]))
            generator = np.random.default_rng([self.seed, self.epoch, lane, window])
            order = start + generator.permutation(stop - start)
            self._recent[lane, window] = order
            while len(self._recent) > 2 * self.lanes:
                self._recent.popitem(last=False)
        return order
