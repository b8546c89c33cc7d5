"""A queue bounded in bytes, between two threads."""

import threading

import pytest

from pipeline.byte_queue import ByteQueue, QueueStoppedError


def test_items_come_out_in_order_until_it_is_closed() -> None:
    queue: ByteQueue[int] = ByteQueue(100)
    for i in range(5):
        queue.put(i, 10)
    queue.close()

    assert list(queue) == [0, 1, 2, 3, 4]


def test_a_full_queue_makes_the_producer_wait() -> None:
    queue: ByteQueue[int] = ByteQueue(10)
    queue.put(0, 10)
    producer = threading.Thread(target=queue.put, args=(1, 1), daemon=True)
    producer.start()
    producer.join(timeout=0.2)
    waited = producer.is_alive()

    items = iter(queue)
    first, second = next(items), next(items)
    producer.join(timeout=10)

    assert waited
    assert (first, second) == (0, 1)


def test_an_item_larger_than_the_bound_passes_an_empty_queue() -> None:
    queue: ByteQueue[str] = ByteQueue(10)

    queue.put("large", 1000)
    queue.close()

    assert list(queue) == ["large"]


def test_stopping_frees_a_waiting_producer_and_ends_the_consumer() -> None:
    queue: ByteQueue[int] = ByteQueue(1)
    queue.put(0, 1)
    caught: list[BaseException] = []

    def produce() -> None:
        try:
            queue.put(1, 1)
        except QueueStoppedError as err:
            caught.append(err)

    producer = threading.Thread(target=produce)
    producer.start()
    queue.stop()
    producer.join(timeout=10)

    assert len(caught) == 1
    assert list(queue) == []
    with pytest.raises(QueueStoppedError):
        queue.put(2, 1)
