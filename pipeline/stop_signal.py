"""The signals that ask a process to end, as a wish that its loops look at."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequestedError(BaseException):
    """A signal came while something could be broken off; no error of ours or of a library's."""


class StopSignals:
    """Notes SIGTERM and SIGINT for the time of a `with` block; a second one acts as before it.

    In another thread than the main one it notes nothing: Python hands signals to that one alone.
    """

    def __init__(self) -> None:
        self._requested = threading.Event()
        self._raises = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in _SIGNALS}
        self.take()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._give_back()

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self._requested.is_set()

    def request(self) -> None:
        """Do as if a signal had come: for whoever learns of one in another way."""
        self._requested.set()

    def take(self) -> None:
        """Install the handlers, again if a library has put its own in their place."""
        if self.requested:
            self._give_back()
            return
        for number in self._before:
            signal.signal(number, self._stop)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Let a signal break the block off: for work that may end anywhere without harm.

        Raises:
            StopRequestedError: a signal came, in the block or before it.
        """
        self._raises = True
        try:
            if self.requested:
                raise StopRequestedError
            yield
        finally:
            self._raises = False

    def _stop(self, number: int, _: FrameType | None) -> None:
        logger.warning("%s: stopping; the same command resumes", signal.Signals(number).name)
        self._requested.set()
        self._give_back()
        if self._raises:
            raise StopRequestedError

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
