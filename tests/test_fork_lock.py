"""A forked process finds every lock free, and what it guards whole."""

import multiprocessing
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from pipeline.fork_lock import ForkLock


def check(lock: ForkLock, steps: list[int]) -> None:
    with lock:
        assert len(steps) % 2 == 0


def test_a_fork_waits_for_the_other_threads_and_leaves_both_processes_their_locks() -> None:
    lock, others, steps = ForkLock(), [ForkLock() for _ in range(8)], []
    entered, ended = threading.Event(), threading.Event()

    def work() -> None:
        while not ended.is_set():
            with lock:
                steps.append(1)
                entered.set()
                time.sleep(0.05)  # a fork here would see half of it, and the lock taken
                steps.append(2)

    def fork_too() -> None:
        run_forked(others[0], [])

    threads = [threading.Thread(target=work), threading.Thread(target=fork_too)]
    for thread in threads:
        thread.start()
    entered.wait()
    try:
        for _ in range(5):
            assert run_forked(lock, steps) == 0
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    with ThreadPoolExecutor(1) as another:  # this thread could take its own again
        assert all(another.map(is_free, (lock, *others)))


def is_free(lock: ForkLock) -> bool:
    if not lock.lock.acquire(blocking=False):
        return False
    lock.lock.release()
    return True


def run_forked(lock: ForkLock, steps: list[int]) -> int | None:
    """Return the exit code of a process that takes the lock, or None where it never could."""
    process = multiprocessing.get_context("fork").Process(target=check, args=(lock, steps))
    process.start()
    process.join(timeout=30)
    if process.exitcode is None:
        process.kill()
        process.join()
        return None
    return process.exitcode
