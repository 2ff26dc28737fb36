"""Rewards: three kinds, several of them, and all that can go wrong with one."""

import json
import math
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest

from ringbpt.config import RolloutConfig, UserError
from ringbpt.rollout.rewards import Answer, Rewards, combined

FILE = """
import os, time
print("a reward may print")

def length(prompt, completion, row):
    return len(completion)

def odd(prompt, completion, row):
    if completion == "raise":
        raise RuntimeError("no idea")
    if completion == "hang":
        time.sleep(60)
    if completion == "die":
        os._exit(3)
    return {"nan": float("nan"), "text": "much"}.get(completion, row["worth"])
"""


def answer(completion: str, worth: float = 1.0) -> Answer:
    return Answer("p", completion, np.array([1], np.int32), {"worth": worth})


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "mine.py").write_text(FILE)
    return tmp_path / "mine.py"


def made(reward: str, said: list[str] | None = None, **flags) -> Rewards:
    config = RolloutConfig(reward=reward, **{"reward_timeout": 3.0, "reward_failures": 1.0} | flags)
    return Rewards(config, policy=None, longest=8, say=(said if said is not None else []).append)


def test_what_fails_is_no_number_is_said_and_the_next_is_asked(file):
    said: list[str] = []
    rewards = made(f"{file}:odd", said, reward_timeout=1.0)
    found = rewards([answer(text, 2.5) for text in ("fine", "raise", "nan", "text", "die", "fine", "hang", "fine")])
    rewards.close()
    np.testing.assert_array_equal(found, [2.5, *[math.nan] * 4, 2.5, math.nan, 2.5])
    assert rewards.failed == 5
    for part in (
        "RuntimeError: no idea",
        "the reward is nan",
        "ValueError",
        "its process has ended",
        "no answer after 1 s",
    ):
        assert any(part in line for line in said), part


def test_too_many_failures_end_the_run(file):
    rewards = made(f"{file}:odd", reward_failures=0.25)
    with pytest.raises(UserError) as error:
        rewards([answer("raise"), answer("fine"), answer("nan")])
    rewards.close()
    assert error.value.code == 3 and "2 of 3 rewards of a rollout have failed" in str(error.value)


class Judge(BaseHTTPRequestHandler):
    """OpenRLHF's remote reward: worth is the length of the query; the first request of each server fails."""

    failures = 1

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).failures -= 1
        if type(self).failures >= 0:
            self.send_error(503)
            return
        assert asked["prompts"] == ["p"] * len(asked["query"]) and len(asked["labels"]) == len(asked["query"])
        body = json.dumps({"rewards": [len(text) for text in asked["query"]]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def test_a_server_is_asked_again_and_several_are_weighed(file):
    with HTTPServer(("127.0.0.1", 0), Judge) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/judge"
        rewards = made(f"{file}:length, {url}", reward_weights="1,-0.5", reward_timeout=10.0)
        found = rewards([answer("abc"), answer("abcde")])
        server.shutdown()
    rewards.close()
    np.testing.assert_allclose(found, [3 - 0.5 * 4, 5 - 0.5 * 6])


def test_no_server_is_no_number_in_time():
    said: list[str] = []
    rewards = made("http://127.0.0.1:9/nobody", said, reward_timeout=1.0)
    assert np.isnan(rewards([answer("a")])).all()
    assert "--rollout.reward=http://127.0.0.1:9/nobody: " in said[0]


def test_both_ways_of_adding_by_hand():
    found = np.array([[1.0, 2.0, 3.0, math.nan], [10.0, 10.0, 40.0, 10.0]])
    np.testing.assert_allclose(combined(found, [1.0, 0.1], normalise=False), [2.0, 3.0, 7.0, math.nan])
    one, other = (2 / 3) ** 0.5, np.std([10, 10, 40, 10])
    want = [-1 / one + (10 - 17.5) / other, (10 - 17.5) / other, 1 / one + (40 - 17.5) / other, math.nan]
    np.testing.assert_allclose(combined(found, [1.0, 1.0], normalise=True), want, rtol=1e-6)
    np.testing.assert_array_equal(combined(np.ones((1, 3)), [1.0], normalise=True), np.zeros(3))


@pytest.mark.parametrize(
    ("reward", "flags", "message"),
    [
        ("nothing", {}, "none of FILE.py:NAME"),
        ("{file}:nobody", {}, "AttributeError: module 'reward' has no attribute 'nobody'"),
        ("/nowhere/x.py:f", {}, "no such file"),
        ("{file}:length", {"reward_weights": "1,2"}, "has 2 numbers and --rollout.reward names 1"),
        ("{file}:length", {"reward_weights": "much"}, "is no list of numbers, as 1,0.5"),
    ],
)
def test_what_is_no_reward_is_said(file, reward, flags, message):
    with pytest.raises(UserError) as error:
        made(reward.format(file=file), **flags).close()
    assert message in str(error.value) and "\n" not in str(error.value)
