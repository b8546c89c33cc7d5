"""Signals that ask a process to end."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest

from pipeline.stop_signal import StopRequestedError, StopSignals


@pytest.fixture
def heard() -> Iterator[list[int]]:
    """What the handlers that were there before hear."""
    seen: list[int] = []
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, lambda number, _: seen.append(number))
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def send_while_waiting(signals: StopSignals) -> None:
    with signals.interrupting():
        send()
        threading.Event().wait(60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_is_a_wish_and_the_second_acts_as_before(
    heard: list[int], number: int
) -> None:
    with StopSignals() as signals:
        assert not signals.requested
        send(number)
        assert (signals.requested, heard) == (True, [])
        send(number)
        assert heard == [number]


def test_the_handlers_are_those_of_before_when_it_is_over(heard: list[int]) -> None:
    with StopSignals():
        pass
    send()

    assert heard == [signal.SIGTERM]


def test_a_signal_breaks_off_what_may_be_broken_off(heard: list[int]) -> None:
    with StopSignals() as signals:
        with pytest.raises(StopRequestedError):
            send_while_waiting(signals)
        assert signals.requested

    assert heard == []


def test_what_may_be_broken_off_does_not_begin_after_a_signal(heard: list[int]) -> None:
    begun = False
    with StopSignals() as signals:
        send()
        with pytest.raises(StopRequestedError), signals.interrupting():
            begun = True

    assert not begun


def test_handlers_that_a_library_has_replaced_are_taken_back(heard: list[int]) -> None:
    stolen: list[int] = []
    with StopSignals() as signals:
        signal.signal(signal.SIGTERM, lambda number, _: stolen.append(number))
        signals.take()
        send()

    assert (signals.requested, stolen, heard) == (True, [], [])


def test_in_another_thread_it_notes_nothing_and_does_no_harm() -> None:
    results: list[bool] = []

    def enter() -> None:
        with StopSignals() as signals, signals.interrupting():
            results.append(signals.requested)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()

    assert results == [False]
