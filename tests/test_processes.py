"""What one process of several sees of the others, with a table and a clock instead of them."""

import json
import socket
import threading
import time

import jax
import pytest

from ringbpt import processes
from ringbpt.config import JaxDistributedConfig, UserError
from ringbpt.processes import Peers, bind_address

CONFIG = JaxDistributedConfig(heartbeat_timeout=10)


class Table:
    """The coordination service: a table and barriers. broken: it does not answer."""

    def __init__(self, count: int):
        self.entries: dict[str, str] = {}
        self.broken = False
        self.barriers = {name: threading.Barrier(count) for name in ("flags", "end")}

    def key_value_set(self, key, value, allow_overwrite=False):
        self.key_value_dir_get(key)
        self.entries[key] = value

    def key_value_dir_get(self, key):
        if self.broken:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE: nobody")
        return sorted((name, value) for name, value in list(self.entries.items()) if name.startswith(key))

    def blocking_key_value_get(self, key, milliseconds):
        return self.entries[key]

    def wait_at_barrier(self, name, milliseconds):
        try:
            self.barriers[name.removeprefix("ringbpt/")].wait(min(milliseconds / 1000, 10))
        except threading.BrokenBarrierError:
            raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: ... names: /job:jax_worker/replica:0/task:1") from None


class World:
    """`count` processes around one table and one clock; ends: (process, code, line) of each that left."""

    def __init__(self, count: int):
        self.now, self.ends, self.table, self.listens = 0.0, [], Table(count), True
        self.peers = [
            Peers(
                self.table,
                number,
                count,
                "10.0.0.1:8476",
                CONFIG,
                leave=lambda code, line, number=number: self.ends.append((number, code, line)),
                seconds=lambda: self.now,
                listens=lambda address: self.listens,
            )
            for number in range(count)
        ]

    def run(self, seconds: float, *silent: int) -> None:
        """Lets a time pass, in which all but the silent ones speak; stops when one has left."""
        until = self.now + seconds
        while self.now < until and not self.ends:
            self.now += 0.5
            for number, one in enumerate(self.peers):
                if number not in silent:
                    one.speak()
                    one.look()


def test_all_are_heard_and_nothing_happens():
    world = World(3)
    world.run(100)
    assert world.ends == []


def test_a_silent_process_is_named_after_the_time_limit():
    world = World(3)
    world.run(5)
    world.run(100, 2)
    assert 15 <= world.now <= 16.5
    [(number, code, line)] = world.ends
    assert (number, code) == (0, 5)
    assert line.startswith("error: process 2 has not been heard of for 10 s (--jax_distributed.heartbeat_timeout)")


def test_a_failed_collective_makes_it_known_sooner():
    world = World(3)
    world.run(5)
    world.peers[1]._suspects = True
    world.run(100, 2)
    assert 8 < world.now <= 10.5 and world.ends[0][2].startswith("error: process 2 has not been heard of for 4")


def test_a_verdict_is_read_by_all():
    world = World(3)
    world.peers[1]._tell(75, "preempted")
    world.peers[2].speak()
    assert world.ends == [(2, 75, "preempted")]
    world.peers[0]._code = 4  # it ends with a code of its own
    world.peers[0].speak()
    assert len(world.ends) == 1


@pytest.mark.parametrize(
    ("listens", "seconds", "says"), [(False, 3.5, "is gone"), (True, 11, "has not answered for 10 s")]
)
def test_process_0_that_is_gone_and_one_that_only_does_not_answer(listens, seconds, says):
    """Where its port is closed it is gone, and seen before jax aborts; a stopped one still has its port."""
    world = World(2)
    world.run(5)
    world.table.broken, world.listens = True, listens
    world.run(100, 0)
    [(number, code, line)] = world.ends
    assert (number, code) == (1, 5) and world.now <= 5 + seconds
    assert line.startswith(f"error: process 0, which coordinates at 10.0.0.1:8476, {says}")


def test_a_process_that_was_stopped_itself_listens_before_it_judges():
    world = World(2)
    world.run(5)
    world.now += 60
    world.peers[0].look()
    assert world.ends == []
    world.run(20)
    assert world.ends == []


def test_a_process_that_ended_with_an_error_of_its_own():
    world = World(3)
    world.run(5)
    world.peers[1]._code = 4
    world.run(100)
    assert world.ends[0][:2] == (0, 5) and world.now < 5 + processes.ERROR_SECONDS
    assert world.ends[0][2].startswith("error: process 1 has ended with exit code 4")


def test_an_exception_is_ours_unless_somebody_is_lost_or_a_collective_says_so(monkeypatch):
    world = World(2)
    peer = world.peers[1]
    peer.period = 0.01
    peer.explain(ZeroDivisionError("ours"))
    assert world.ends == [] and not peer._suspects
    peer.explain(ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer\nat"))
    assert world.ends[0][2].startswith("error: a collective with the other processes failed, though all are heard of: ")
    seen = []
    monkeypatch.setattr(processes, "_peers", peer)
    monkeypatch.setattr(peer, "explain", seen.append)
    for error, looked_at in ((UserError("x"), 0), (UserError("x", code=4), 1), (OSError("x"), 2)):
        with pytest.raises(type(error)), processes.guarded():
            raise error
        assert len(seen) == looked_at
    with pytest.raises(KeyboardInterrupt), processes.guarded():
        raise KeyboardInterrupt
    assert len(seen) == 2


def test_who_is_behind():
    world = World(3)
    for one, step in zip(world.peers, (7, 6, 7), strict=True):
        one.step = step
        one.speak()
    assert world.peers[0].behind() == "; process 1 has been at step 6 since, others at 7"
    world.table.broken = True
    assert "does not answer" in world.peers[1].behind()


def test_flags_are_compared_and_the_first_that_differs_is_named_to_all():
    world = World(3)
    found = [""] * 3

    def ask(number: int, seed: int) -> None:
        try:
            world.peers[number].agree("flags", {"--lr": 0.1, "--seed": seed, "--name": "x"})
        except UserError as error:
            found[number] = f"{error.code}: {error}"

    for seeds, wanted in (((1, 1, 1), ""), ((1, 1, 2), "2: --seed differs: 1 in process 0, 2 in process 2: give all")):
        threads = [threading.Thread(target=ask, args=(number, seed)) for number, seed in enumerate(seeds)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        assert all(text.startswith(wanted) and bool(text) == bool(wanted) for text in found), found


def test_where_process_0_listens():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError) as error:
            bind_address(JaxDistributedConfig(coordinator_address=address, process_id=0))
    assert f"--jax_distributed.coordinator_address={address}: process 0 cannot listen there (Address" in str(
        error.value
    )
    # The given address, and not all there are; the other processes listen nowhere.
    assert bind_address(JaxDistributedConfig(coordinator_address=address, process_id=0)) == address
    assert bind_address(JaxDistributedConfig(coordinator_address=address, process_id=1)) is None
    given = JaxDistributedConfig(coordinator_address="192.0.2.1:80", coordinator_bind_address=address, process_id=0)
    assert bind_address(given) == address
    for wrong in ("nowhere", "host:port", "host:99999", ":"):
        with pytest.raises(UserError, match=r"coordinator_address=.* is no <host>:<port>"):
            bind_address(JaxDistributedConfig(coordinator_address=wrong, process_id=0))


def test_the_words_are_json():
    world = World(1)
    world.peers[0].speak()
    assert json.loads(world.table.entries["ringbpt/alive/0"]) == [1, -1, False, -1]


def test_a_farewell_of_jax_that_hangs_is_cut_short(monkeypatch):
    world, exits = World(1), []
    monkeypatch.setattr(processes, "FAREWELL_SECONDS", 0.01)
    monkeypatch.setattr(processes.os, "_exit", exits.append)
    world.peers[0]._end(75)
    until = time.monotonic() + 10
    while not exits and time.monotonic() < until:
        time.sleep(0.01)
    assert exits == [75]
