"""The processes of one run: how they meet, that they were given the same flags, and who is lost.

jax.distributed ends a process whose peer is lost by abort(), with a C++ stack; what is here notices first. Each process
says every second or two, in the coordination service's table, that it is alive and at which step it is; process 0 reads
what all say. Whoever finds that a process is lost writes the verdict there, for all to read, and leaves with it.
"""

import ctypes
import hashlib
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import jax
import numpy as np

from ringbpt import ending
from ringbpt.config import JaxDistributedConfig, UserError

FLAG = "--jax_distributed."
SPARE_SECONDS = 30  # that jax's own time limits come after ours, which end without a C++ stack
ERROR_SECONDS = 10  # for the others to end with the same error, or to hear of it
FAREWELL_SECONDS = 20.0  # for what jax does at the end of a process, once all processes have come to theirs
ANSWER_SECONDS = 2.0  # that the service may take to answer who is about to leave
COLLECTIVE = re.compile(r"gloo|nccl|connection (reset|closed)|broken pipe|socket closed|unavailable|deadline", re.I)

_peers: "Peers | None" = None


# --- telling ---


def told(value: Any) -> Any:
    """What process 0 has, as JSON knows it, in every process; all call it."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.array(len(data))))
    found = np.zeros(length, np.uint8)
    found[: min(length, len(data))] = data[:length]
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(found)).tobytes())


# --- joining ---


def join(distributed: JaxDistributedConfig) -> None:
    """Joins the other processes, as the flags say or as jax finds them.

    Raises UserError for what cannot work; leaves with PEER_LOST where not all came within initialization_timeout.
    """
    global _peers  # noqa: PLW0603  (a process joins once, as jax's own client is one)
    bind = bind_address(distributed)
    address, count, number = distributed.coordinator_address, distributed.num_processes, distributed.process_id
    ids = [int(i) for i in distributed.local_device_ids.split(",")] if distributed.local_device_ids else None
    # It takes SIGTERM for itself, and only says it to who asks after each step: what asks here is Agreement, which
    # knows other signals and a clock too, and makes each process's wish known to all by one program.
    jax.config.update("jax_enable_preemption_service", False)
    limit = distributed.initialization_timeout
    over = threading.Timer(
        limit, lambda: ending.leave(ending.PEER_LOST, f"error: {_never_came(address, number, limit)}")
    )
    over.daemon = True
    over.start()
    try:
        jax.distributed.initialize(
            address,
            count,
            number,
            local_device_ids=ids,
            initialization_timeout=limit + SPARE_SECONDS,
            heartbeat_timeout_seconds=distributed.heartbeat_timeout + SPARE_SECONDS,
            shutdown_timeout_seconds=distributed.shutdown_timeout + SPARE_SECONDS,
            coordinator_bind_address=bind,
        )
    except ValueError as error:  # nothing was given, and this is no cluster that jax knows
        raise UserError(
            f"{FLAG}initialize_jax_distributed: {error} Give {FLAG}coordinator_address=<host>:<port>, num_processes "
            "and process_id"
        ) from None
    finally:
        over.cancel()
    from jax._src.distributed import global_state  # the one way to the table and the barriers of the service

    if global_state.num_processes > 1:
        where = global_state.coordinator_address or ""
        _peers = Peers(global_state.client, global_state.process_id, global_state.num_processes, where, distributed)
        _peers.start()


def bind_address(distributed: JaxDistributedConfig) -> str | None:
    """Where process 0 listens: as the flag says, or at the address given to all; None: jax decides, or another listens.

    Raises UserError where nobody can listen there: the service itself would end the process by a signal.
    """
    own, given = distributed.coordinator_bind_address, distributed.coordinator_address
    if distributed.process_id != 0 or not (own or given):
        return own
    flag, text = (f"{FLAG}coordinator_bind_address", own) if own else (f"{FLAG}coordinator_address", given)
    assert text is not None
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"{flag}={text} is no <host>:<port>: as 10.0.0.1:8476")
    try:
        infos = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
        family, kind, protocol, _, place = infos[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        other = f"another port, or {FLAG}coordinator_bind_address=0.0.0.0:{port} where that address is another name's"
        raise UserError(f"{flag}={text}: process 0 cannot listen there ({error.strerror}): give {other}") from None
    return text


def _never_came(address: str | None, number: int | None, limit: float) -> str:
    """What is seen of a start to which not all processes came."""
    what = f"not all processes came within {limit} s ({FLAG}initialization_timeout)"
    if number == 0 or not address:
        return f"{what}: at least one was not started, or does not reach {address or 'process 0'}"
    if not _listens(address):
        return f"{what}: process 0 does not listen at {address}"
    return f"{what}: process 0 listens at {address}, so another one is missing"


def _listens(address: str) -> bool:
    """Whether somebody accepts a connection there; a machine that does not answer at all may yet."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), 1).close()
    except TimeoutError:
        return True
    except OSError:
        return False
    return True


# --- what the rest of the house asks ---


def meet(name: str) -> None:
    """Waits until all processes are here, however long: who is lost meanwhile is noticed. No device takes part."""
    if _peers:
        _peers.meet(name)


def agree(what: str, values: Mapping[str, Any]) -> None:
    """Raises UserError, in all processes, where one of them has other values; it names the first that differs."""
    if _peers:
        _peers.agree(what, values)


def at(step: int) -> None:
    """What this process says to the others of where it is."""
    if _peers:
        _peers.step = step


def give_up(what: str) -> None:
    """Leaves with PEER_LOST, and so do the others; what: seen here, to which is added who is behind."""
    ending.leave(ending.PEER_LOST, f"error: {what}{_peers.behind() if _peers else ''}")


@contextmanager
def guarded() -> Iterator[None]:
    """An exception in here is looked at: where another process is lost it is not ours, and ends with PEER_LOST."""
    try:
        yield
    except Exception as error:
        if _peers and not (isinstance(error, UserError) and error.code in (2, 3)):
            _peers.explain(error)
        raise


# --- who is alive ---


class Peers:
    """This process among the others, by the coordination service's client."""

    def __init__(
        self,
        client: Any,
        number: int,
        count: int,
        address: str,
        config: JaxDistributedConfig,
        leave: Callable[[int, str], Any] = ending.leave,
        seconds: Callable[[], float] = time.monotonic,
        listens: Callable[[str], bool] = _listens,
    ):
        self._listens = listens
        self._client, self._number, self._count, self._address = client, number, count, address
        self._config, self._leave, self._seconds = config, leave, seconds
        # Between two words of a process: two thousand small requests a second at most, from however many.
        self.period = min(1 + count / 1000, config.heartbeat_timeout / 5)
        self.step = -1
        self._said, self._suspects, self._gone, self._code = 0, False, False, -1
        self._answered = self._looked = seconds()
        self._heard = {one: ("", seconds()) for one in range(count)}
        self._ended, self._left_first = threading.Event(), 0.0

    def start(self) -> None:
        """Two threads: one speaks and listens, which may hang; the other only looks at the clock."""
        # abort() of jax's client, where process 0 was killed: its thread is held for signal 6's number of seconds, by
        # libc's sleep as the handler, while ours, which also sees that nobody answers, ends the process.
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
            libc.signal(int(signal.SIGABRT), ctypes.cast(libc.sleep, ctypes.c_void_p))
        ending.tell(self._tell, self._end)
        for run, each in ((self.speak, self.period), (self.look, self.period / 2)):
            threading.Thread(target=self._again, args=(run, each), name=run.__name__, daemon=True).start()

    def _again(self, run: Callable[[], None], each: float) -> None:
        while not self._ended.wait(each):
            run()

    def speak(self) -> None:
        """Says that this process is alive, reads what was found of others, and, as process 0, what they say."""
        try:
            self._said += 1
            words = json.dumps([self._said, self.step, self._suspects, self._code])
            self._client.key_value_set(f"ringbpt/alive/{self._number}", words, allow_overwrite=True)
            verdicts = self._client.key_value_dir_get("ringbpt/verdict/")
            said = self._client.key_value_dir_get("ringbpt/alive/") if self._number == 0 else []
        except jax.errors.JaxRuntimeError:
            return  # the other thread sees how long it has been
        now = self._seconds()
        self._answered = now
        for key, value in said:
            one = int(key.rpartition("/")[2])
            if self._heard[one][0] != value:
                self._heard[one] = (value, now)
        if verdicts and self._code < 0:  # else it ends with a code of its own
            code, line = json.loads(verdicts[0][1])
            self._leave(code, line)

    def look(self) -> None:
        """Looks at the clock alone: who has been silent for too long."""
        now, since = self._seconds(), self._looked
        self._looked = now
        if now - since > 3 * self.period:
            return  # this process itself was stopped: first it listens
        limit = self._config.heartbeat_timeout
        after = f"for {limit} s ({FLAG}heartbeat_timeout): lost, stopped, or cut off"
        if self._number != 0:
            unanswered, coordinator = now - self._answered, f"process 0, which coordinates at {self._address},"
            # abort() of jax's client is held (see `start`) for longer than this, but not for ever.
            if unanswered > self.period + 1.5 and self._code < 0 and not self._listens(self._address):
                self._gone = True
                self._lost(f"{coordinator} is gone")
            if unanswered > limit:
                self._lost(f"{coordinator} has not answered {after}")
            return
        said = {one: json.loads(words) for one, (words, _) in self._heard.items() if words}
        suspected = any(words[2] for words in said.values())
        allowed = min(limit, 4 * self.period) if suspected else limit
        silent = [one for one, (_, when) in self._heard.items() if one and now - when > allowed]
        if silent:
            seen = f"for {allowed:g} s, and a collective with it has failed: it is lost" if suspected else after
            self._lost(f"{_names(silent)} not been heard of {seen}")
        left = [one for one, words in said.items() if words[3] > 0]
        if left and self._code < 0:
            self._left_first = self._left_first or now
            if now - self._left_first > ERROR_SECONDS / 2:
                self._lost(f"{_names(left)} ended with exit code {said[left[0]][3]}; its own last line says why")

    def _lost(self, what: str) -> None:
        self._leave(ending.PEER_LOST, f"error: {what}; --autoresume goes on from the newest checkpoint")

    def explain(self, error: Exception) -> None:
        """Returns where all others are alive and this error is ours; else leaves, or waits until a thread does."""
        self._suspects = True
        self._ended.wait(7 * self.period)
        self._suspects = False
        first = str(error).strip().split("\n")[0][:300]
        if COLLECTIVE.search(str(error)):
            self._lost(f"a collective with the other processes failed, though all are heard of: {first}")

    def behind(self) -> str:
        """Which processes are at the lowest step, where the table still tells."""
        found: list[list[tuple[str, str]]] = []
        ask = lambda: found.append(self._client.key_value_dir_get("ringbpt/alive/"))  # noqa: E731
        _within(ANSWER_SECONDS, ask)
        steps = {int(key.rpartition("/")[2]): json.loads(words)[1] for key, words in (found[0] if found else [])}
        if not steps:
            return f"; process 0, which coordinates at {self._address}, does not answer"
        slowest = [one for one, step in sorted(steps.items()) if step == min(steps.values())]
        if len(slowest) == self._count:
            return f"; all {self._count} processes are at step {self.step}"
        return f"; {_names(slowest)} been at step {steps[slowest[0]]} since, others at {max(steps.values())}"

    # --- together ---

    def meet(self, name: str) -> None:
        try:
            self._client.wait_at_barrier(f"ringbpt/{name}", 7 * 24 * 3600 * 1000)
        except jax.errors.JaxRuntimeError as error:
            self.explain(error)
            self._lost(f"waiting for the other processes ({name}) failed: {str(error).splitlines()[0]}")

    def agree(self, what: str, values: Mapping[str, Any]) -> None:
        texts = {name: json.dumps(value, sort_keys=True) for name, value in values.items()}
        whole = json.dumps(texts)
        digest = hashlib.sha256(whole.encode()).hexdigest()
        self._client.key_value_set(f"ringbpt/{what}/whole/{self._number}", whole)
        self._client.key_value_set(f"ringbpt/{what}/digest/{self._number}", digest)
        self.meet(what)
        said = self._client.key_value_dir_get(f"ringbpt/{what}/digest/")
        digests = {int(key.rpartition("/")[2]): value for key, value in said}
        other = next((one for one in sorted(digests) if digests[one] != digests[0]), None)
        if other is None:
            return
        first, second = (
            json.loads(self._client.blocking_key_value_get(f"ringbpt/{what}/whole/{one}", 10_000)) for one in (0, other)
        )
        name = next(name for name in (*first, *second) if first.get(name) != second.get(name))
        raise UserError(
            f"{name} differs: {first.get(name)} in process 0, {second.get(name)} in process {other}: give all "
            "processes the same"
        )

    # --- the end ---

    def _tell(self, code: int, line: str) -> None:
        """The verdict, for all to read; process 0, without which nobody can read it, waits until they have."""
        if not self._gone:
            verdict = json.dumps([code, line])
            _within(ANSWER_SECONDS, partial(self._client.key_value_set, f"ringbpt/verdict/{code}", verdict))
        if self._number == 0:
            time.sleep(1.5 * self.period)

    def _end(self, code: int) -> None:
        """All end together; an error alone is heard of by the others, and is not waited for longer than that takes."""
        self._code = code
        alike = code in (0, ending.PREEMPTED, ending.INTERRUPTED)
        limit = self._config.shutdown_timeout if alike else ERROR_SECONDS
        try:
            self._client.wait_at_barrier("ringbpt/end", int(limit * 1000))
        except jax.errors.JaxRuntimeError as error:
            missing = sorted({int(one) for one in re.findall(r"task:(\d+)", str(error))} - {self._number})
            if alike:
                who = f"{_names(missing)} not come to the end" if missing else str(error).splitlines()[0]
                ending.exit_now(code, f"warning: {who} within {limit} s ({FLAG}shutdown_timeout)")
            if self._number == 0:
                line = f"error: process 0 ended with exit code {code}; its own last line says why"
                self._tell(ending.PEER_LOST, line)
            os._exit(code)
        self._ended.set()
        # All that is to be saved is, and all have said so; jax's own farewell was seen to hang for minutes after that.
        farewell = threading.Timer(FAREWELL_SECONDS, os._exit, (code,))
        farewell.daemon = True
        farewell.start()


def _names(numbers: list[int]) -> str:
    """The processes, as the beginning of a sentence in the perfect."""
    if len(numbers) == 1:
        return f"process {numbers[0]} has"
    shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
    return f"processes {shown} have"


def _within(seconds: float, call: Callable[[], Any]) -> None:
    """Calls it, and does not wait for it longer: whom it asks may have been stopped."""

    def quietly() -> None:
        with suppress(Exception):
            call()

    thread = threading.Thread(target=quietly, daemon=True)
    thread.start()
    thread.join(seconds)
