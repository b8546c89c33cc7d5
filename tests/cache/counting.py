"""A store that counts what is asked of it, slowly if need be."""

import threading
import time
from collections import Counter

from pipeline.storage import Store


class CountingStore(Store):
    """Counts reads by the first folder of their path."""

    def __init__(self, url: str, *, pause_s: float = 0.0) -> None:
        super().__init__(url)
        self.pause_s = pause_s
        self.reads: Counter[str] = Counter()
        self.ranges = 0
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()

    def read(self, path: str, *, most: int | None = None) -> bytes:
        with self._lock:
            self.reads[path.split("/")[0]] += 1
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        time.sleep(self.pause_s)
        try:
            return super().read(path, most=most)
        finally:
            with self._lock:
                self._at_once -= 1

    def read_range(self, path: str, offset: int, length: int) -> bytes:
        with self._lock:
            self.ranges += 1
        return super().read_range(path, offset, length)
