"""Batches come in order and ahead of time, and what the taker waits is told."""

import threading
import time

import pytest

from ringbpt.data.delivery import AHEAD, Delivery


def test_batches_come_in_order_and_ahead():
    made, may_go = [], threading.Semaphore(0)

    def make(step):
        may_go.acquire()
        made.append(step)
        return f"batch {step}"

    source = Delivery(make, range(3, 9))
    for _ in range(1 + AHEAD):
        may_go.release()
    assert source.batch(3, "the state") == "batch 3"
    deadline = time.monotonic() + 10
    while len(made) < 1 + AHEAD and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made == [3, 4, 5]  # while batch 3 is worked on
    for _ in range(9):
        may_go.release()
    assert [source.batch(step, "the state") for step in range(4, 9)] == [f"batch {step}" for step in range(4, 9)]


def test_waiting_is_counted_once():
    delivery = Delivery(lambda step: time.sleep(0.05), range(3))
    for step in range(3):
        delivery.batch(step)
    assert delivery.take_waited() >= 0.12 and delivery.take_waited() == 0.0
    ready = Delivery(lambda step: step, range(3))
    for step in range(3):
        assert ready.batch(step) == step
        time.sleep(0.05)
    assert ready.take_waited() < 0.05  # the thread's start; the work itself waits for nothing


def test_what_fails_is_raised_in_its_turn():
    def make(step):
        if step == 1:
            raise KeyError(step)
        return step

    source = Delivery(make, range(5))
    assert source.batch(0) == 0
    with pytest.raises(KeyError):
        source.batch(1)
    source.close()


def test_what_the_devices_are_at_is_no_waiting():
    class Step:
        """A state that is done in a while."""

        def block_until_ready(self):
            time.sleep(0.2)

    late = Delivery(lambda step: time.sleep(0.25), range(1))
    late.batch(0, Step())
    assert late.take_waited() < 0.2
