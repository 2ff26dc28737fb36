"""Servers sample for a run: the same rollouts as its own devices sample, ahead of it too, whoever is lost meanwhile."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ringbpt.checkpoint.export import to_huggingface
from ringbpt.config import UserError
from ringbpt.ending import Stopped
from ringbpt.rollout import http_engine
from ringbpt.rollout.ahead import Ahead, Asked, Interrupted, InTurns, decoded, encoded
from ringbpt.rollout.engine import Sample
from ringbpt.rollout.http_engine import HttpEngine
from ringbpt.training.metrics import read_rows
from tests.rollout.test_rollouts import data, rewards, stored  # noqa: F401
from tests.rollout.test_serve import Server
from tests.rollout.test_serve import serving as serving_any
from tests.training.test_loop import FULL, refusal, train

pytestmark = pytest.mark.usefixtures("compiled_once")
STALE = ("--rollout.max_staleness=1", "--policy.correction=token_truncate")


@pytest.fixture(scope="module")
def base(data, tmp_path_factory) -> Path:  # noqa: F811
    """The model that all begin with, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("base")
    run = train(folder, *data, "--objective=grpo", "--total_steps=1", "--optimizer.adamw_optimizer.lr=0")
    to_huggingface(f"params::{run}", folder / "hf", dtype="fp32")
    return folder / "hf"


@pytest.fixture(scope="module")
def words(data, base) -> tuple[str, ...]:  # noqa: F811
    return (*data, "--objective=grpo", f"--load_checkpoint=huggingface::{base}", "--total_steps=5", *FULL)


def serving(base: Path, *flags: str) -> AbstractContextManager[Server]:
    return serving_any(base, "--tokenizer=bytes", *flags)


def of(*servers: Server) -> str:
    return f"--rollout.servers={','.join(server.url for server in servers)}"


@pytest.fixture(scope="module")
def server(base) -> Iterator[Server]:
    with serving(base) as server:
        yield server


def facts(run: Path, name: str) -> list[float]:
    return [row[f"rollout/{name}"] for row in read_rows(run / "metrics.jsonl")]


def assert_alike(run: Path, other: Path) -> None:
    """Rewards to the last bit, and every column."""
    assert rewards(run) == rewards(other)
    ours, theirs = stored(run), stored(other)
    assert ours.keys() == theirs.keys()
    for name, arrays in ours.items():
        for column, array in arrays.items():
            np.testing.assert_allclose(array, theirs[name][column], atol=1e-4, err_msg=f"{name} {column}")


def test_a_server_samples_what_the_run_itself_would(words, server, tmp_path):
    own = train(tmp_path, *words, name="own")
    served = train(tmp_path, *words, of(server), name="served")
    assert_alike(served, own)
    assert facts(served, "staleness") == [0] * 5
    assert server.ask("/weight_info")[1]["version"] == 4
    assert [path.name for path in (served / "weights").iterdir()] == ["00000004"]


def test_one_step_off_is_a_run_like_any_other(words, server, tmp_path):
    """Ended, and gone on with, it is as if nothing had been: each rollout is by the weights that it would have had."""
    whole = train(tmp_path, *words, of(server), *STALE, name="whole")
    assert facts(whole, "staleness") == [0, 1, 1, 1, 1]
    run = train(tmp_path, *words, of(server), *STALE, "--total_steps=3", name="run")
    assert [int(path.name) for path in sorted((run / "weights").iterdir())] == [1, 2]
    train(tmp_path, *words, of(server), *STALE, "--autoresume", name="run")
    assert_alike(run, whole)


@pytest.mark.slow
def test_one_step_off_learns_as_well(words, server, tmp_path, capsys):
    """The reward that is reached, the mean of the last ten steps, within 5 % of that of taking turns."""
    words = (*words, "--total_steps=150", "--rollout.prompts_per_step=8")
    own = rewards(train(tmp_path, *words, name="own"))
    off = rewards(train(tmp_path, *words, of(server), *STALE, name="off"))
    before, after = np.mean(own[-10:]), np.mean(off[-10:])
    with capsys.disabled():
        print(f"from {np.mean(own[:3]):.3f}: taking turns {before:.4f}, one step off {after:.4f}")
    assert np.mean(own[:3]) < 0.35 and before > 0.9 and after > 0.95 * before


def test_what_is_said_where_weights_are_gone(words, server, tmp_path, capsys):
    import shutil

    run = train(tmp_path, *words, of(server), *STALE, "--total_steps=3")
    shutil.rmtree(run / "weights")
    train(tmp_path, *words, of(server), *STALE, "--autoresume")
    assert "rollout 3 is sampled by newer weights" in capsys.readouterr().out


def test_no_server_is_said_at_once(words, base, server, tmp_path):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        begin = time.monotonic()
        said = refusal(tmp_path, *words, f"--rollout.servers=http://127.0.0.1:{nobody.getsockname()[1]}")
        assert time.monotonic() - begin < 10 and "python -m ringbpt.serve" in said and "refused" in said
    with serving(base, "--max_sequence_length=8") as short:
        assert "--max_sequence_length=" in refusal(tmp_path, *words, of(short))


def test_the_last_server_is_lost_and_the_run_is_saved(words, base, tmp_path, monkeypatch):
    """Its own words, a checkpoint of what was learnt, and the run goes on from it with another server."""
    with serving(base) as server, serving(base) as another:
        whole = train(tmp_path, *words, of(another), name="whole")
        ask = http_engine.Address.ask

        def until_the_third(self: Any, path: str, *more: Any, **named: Any) -> Any:
            if path == "/update_weights_from_disk" and more[0]["version"] == 3:
                server.process.kill()
                server.process.wait()
            return ask(self, path, *more, **named)

        monkeypatch.setattr(http_engine.Address, "ask", until_the_third)
        with pytest.raises(UserError, match="no server has been up for 1 s") as error:
            train(tmp_path, *words, of(server), "--rollout.server_timeout=1")
        assert error.value.code == 3
        monkeypatch.setattr(http_engine.Address, "ask", ask)
        run = train(tmp_path, *words, of(another), "--autoresume")
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert_alike(run, whole)


# --- without servers ---

SECONDS = 0.1


class Made:
    """In an engine's place: an answer takes SECONDS. version: of the weights that it has."""

    version = -1

    def update(self, version: Any) -> None:
        self.version = version

    def close(self) -> None:
        pass


class Kept:
    """In a shelf's place."""

    def __init__(self) -> None:
        self.there: set[int] = set()

    def version(self, number: int) -> int:
        assert number in self.there
        return number

    def has(self, number: int) -> bool:
        return number in self.there

    def put(self, number: int, params: Any) -> None:
        self.there.add(number)

    def drop_before(self, number: int) -> None:
        self.there -= set(range(number))


def ask(engine: Any, number: int, version: int) -> Asked:
    time.sleep(SECONDS)
    assert engine.version == version
    return Asked([[Sample([number], [-1.0], "stop")]], np.zeros((1, 1)), version, SECONDS, {})


@pytest.mark.parametrize("staleness", (0, 1, 3))
def test_engine_and_trainer_work_at_once(staleness):
    """With steps as long as answers, in little more than half the time of taking turns; never staler than allowed."""
    count, shelf = 20, Kept()
    ahead = Ahead(Made(), ask, shelf, staleness, count, print)
    begin, found = time.monotonic(), []
    for number in range(count):
        ahead.hand_over(number, None, False, lambda n: False)
        asked = ahead.take(number, None)
        assert asked.samples[0][0].tokens == [number]
        found.append(number - asked.version)
        time.sleep(SECONDS)
    share = (time.monotonic() - begin) / (2 * SECONDS * count)
    ahead.close()
    assert found == [min(n, staleness) for n in range(count)] and len(shelf.there) <= staleness + 1
    assert share <= 0.60 if staleness else share >= 0.99


def test_what_has_ended_one_rollout_ends_the_run_and_no_thread_is_left():
    def fails(engine: Any, number: int, version: int) -> Asked:
        raise UserError("lost", code=3)

    ahead = Ahead(Made(), fails, Kept(), 1, 4, print)
    ahead.hand_over(0, None, False, lambda n: False)
    with pytest.raises(UserError, match="lost"):
        ahead.take(0, None)
    ahead.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("rollouts")]


def test_a_signal_ends_the_waiting_for_a_rollout(words, tmp_path, monkeypatch):
    """At once, with what was learnt saved; the same command goes on as if nothing had been."""
    let_go, told = threading.Event(), []

    def hangs(engine: Any, number: int, version: int) -> Asked:
        let_go.wait(30)
        raise UserError("too late")

    ahead = Ahead(Made(), hangs, Kept(), 1, 4, print, signalled=lambda: 75 if told else 0)
    ahead.hand_over(0, None, False, lambda n: False)
    threading.Timer(0.2, told.append, [True]).start()
    begin = time.monotonic()
    with pytest.raises(Interrupted) as interrupted:
        ahead.take(0, None)
    assert interrupted.value.code == 75 and time.monotonic() - begin < 5
    let_go.set()
    ahead.close()
    take = InTurns.take

    def signalled(self: Any, number: int, params: Any) -> Asked:
        if number == 2:
            raise Interrupted(75)
        return take(self, number, params)

    monkeypatch.setattr(InTurns, "take", signalled)
    with pytest.raises(Stopped, match="saved step 2") as stopped:
        train(tmp_path, *words, "--total_steps=4", name="run")
    assert stopped.value.code == 75
    monkeypatch.setattr(InTurns, "take", take)
    train(tmp_path, *words, "--total_steps=4", "--autoresume", name="run")
    assert_alike(tmp_path / "run", train(tmp_path, *words, "--total_steps=4", name="whole"))


def test_a_server_that_is_another_since_reads_again(words, base, tmp_path, monkeypatch):
    """Restarted between two rollouts, at the same address, where both are by the same weights."""
    generate, again = HttpEngine.generate, []
    with serving(base) as lost:
        port = lost.url.rpartition(":")[2]
        whole = train(tmp_path, *words, of(lost), *STALE, "--total_steps=3", name="whole")
        to_huggingface(f"params::{whole}", tmp_path / "other", dtype="fp32")

        def restarted(self: Any, *given: Any) -> Any:
            found = generate(self, *given)
            if not again:
                lost.process.kill()
                lost.process.wait()
                again.append(Server(tmp_path / "other", "--tokenizer=bytes", f"--port={port}"))
            return found

        monkeypatch.setattr(HttpEngine, "generate", restarted)
        run = train(tmp_path, *words, of(lost), *STALE, "--total_steps=3", name="run")
        again[0].process.kill()
        again[0].process.communicate()
    assert_alike(run, whole)


def test_what_is_said_is_what_all_processes_hear():
    asked = Asked(
        [[Sample([1, 2], [-0.1, -1 / 3], "length")]], np.array([[np.nan], [0.1]]), 3, 0.5, {"rollout/turns": 2.0}
    )
    found = decoded(json.loads(json.dumps(encoded(asked))))
    assert found.samples[0][0][:3] == asked.samples[0][0][:3] and found[2:] == asked[2:]
    np.testing.assert_array_equal(found.found, asked.found)
    with pytest.raises(UserError, match="lost") as error:
        decoded({"error": "lost", "code": 3})
    assert error.value.code == 3
