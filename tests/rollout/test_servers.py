"""Kinds of servers: what vLLM and SGLang are asked, by answers that were recorded of the one and are the other's form.

They say of a probe what its folder says, unless they are planted to do otherwise. With the real vLLM: test_vllm.py.
"""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ringbpt.checkpoint.load import load_model
from ringbpt.config import UserError
from ringbpt.rollout import http_engine
from ringbpt.rollout.handover import Shelf
from ringbpt.rollout.http_engine import HttpEngine
from ringbpt.rollout.servers import KINDS
from tests.rollout.test_serve import model_folder

TEMPERATURE, SAMPLES, NEW = 0.7, 3, 4
ENDS = frozenset({66, 90})
PROMPTS = [np.array(tokens, np.int32) for tokens in ([5, 9, 11], [7], [4, 4, 8, 30])]


class Made:
    """A server's answers. stale: it says that it reads weights, and does not. raw: log-probabilities as they are before
    the temperature. emptied: whether its cache can be. aborts: how many answers it ends before their time.
    """

    def __init__(self, kind: str, stale: bool = False, raw: bool = False, emptied: bool = True, aborts: int = 0):
        self.kind, self.stale, self.raw, self.emptied, self.aborts = kind, stale, raw, emptied, aborts
        self.folder: Path | None = None
        self.asked: list[tuple[str, Any]] = []
        self.routes: dict[str, Callable[[Any], Any]] = {"/v1/models": self.models, "/health": lambda _: None}
        self.routes["/v1/completions"] = self.completions
        if kind == "vllm":
            self.routes["/weight_info"] = lambda _: {"weight_version": "default"}
            self.routes["/collective_rpc"] = self.rpc
            self.routes["/reset_prefix_cache?reset_running_requests=true"] = lambda _: {"success": self.emptied}
        else:
            self.routes["/update_weights_from_disk"] = lambda body: self.read(body["model_path"])
        self.lock = threading.Lock()

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        with self.lock:
            self.asked.append((path, body))
            return (200, self.routes[path](body)) if path in self.routes else (404, {"detail": "Not Found"})

    def models(self, _: Any) -> Any:
        return {"object": "list", "data": [{"id": "a", "object": "model", "owned_by": self.kind, "max_model_len": 128}]}

    def rpc(self, body: Any) -> Any:
        assert body.keys() == {"method", "kwargs"} and body["method"] == "reload_weights"
        self.read(body["kwargs"]["weights_path"])
        return {"results": [None]}

    def read(self, folder: str) -> Any:
        if self.folder is None or not self.stale:
            self.folder = Path(folder)
        return {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0}

    def completions(self, body: Any) -> Any:
        """A probe's token is the likeliest one; another prompt is answered by how many there were before."""
        assert self.folder is not None
        with np.load(self.folder / "probe.npz") as stored:
            logp_PV = stored["logp"]
        if self.raw:  # its logits have another temperature
            hot = logp_PV * TEMPERATURE
            logp_PV = hot - np.log(np.exp(hot).sum(-1, keepdims=True))
        prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]] * body["n"]
        choices = []
        for i in range(len(prompts)):
            token = int(logp_PV[i % len(logp_PV)].argmax())
            size = body["max_tokens"]
            logps = {"token_logprobs": [float(logp_PV[i % len(logp_PV), token])] * size, "tokens": ["?"] * size}
            choices.append(
                {"index": i, "text": "", "token_ids": [token] * size, "logprobs": logps, "stop_reason": None}
            )
            choices[-1]["finish_reason"] = "abort" if self.aborts and size > 1 else "length"
        self.aborts -= bool(self.aborts and body["max_tokens"] > 1)
        return {"object": "text_completion", "model": "a", "choices": choices[::-1]}


@contextmanager
def standing_in(made: Made) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            status, found = made.answer(self.path, json.loads(self.rfile.read(length) or b"null"))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b"" if found is None else json.dumps(found).encode())

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Shelf:
    """Version 0, and version 1, of other weights."""
    run = tmp_path_factory.mktemp("run")
    folder = model_folder(run / "tiny")
    model, params = load_model(f"huggingface::{folder}", (1, 1, 1, 1))
    model = replace(model, temperature=TEMPERATURE)
    found = Shelf(run, model, "fp32", json.loads((folder / "config.json").read_text()), np.arange(20, dtype=np.int32))
    found.put(0, params)
    found.put(1, params | {"unembed": params["unembed"] * 1.1})
    return found


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(http_engine, "PERIOD_SECONDS", 0.01)


def engine_of(url: str, **more: Any) -> HttpEngine:
    engine = HttpEngine([url], NEW, ENDS, TEMPERATURE, say=lambda _: None, **more)
    engine.find(longest=10)
    return engine


def sample(engine: HttpEngine, shelf: Shelf, number: int) -> list[list[Any]]:
    engine.update(shelf.version(number))
    return engine.generate(PROMPTS, SAMPLES, TEMPERATURE, seed=1000)


READ = {
    "vllm": lambda folder: [
        ("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}}),
        ("/reset_prefix_cache?reset_running_requests=true", {}),
    ],
    "sglang": lambda folder: [("/update_weights_from_disk", {"model_path": folder})],
}
SEEDS = {"vllm": [1000, 1003, 1006], "sglang": [None] * 3}
BY_NAME = {
    "n": SAMPLES, "temperature": TEMPERATURE, "max_tokens": NEW, "logprobs": 0, "stop_token_ids": [66, 90],
    "return_token_ids": True, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True,
}  # fmt: skip
OWN = {"vllm": {"return_tokens_as_token_ids": True}, "sglang": {"no_stop_trim": True}}


@pytest.mark.parametrize("kind", READ)
def test_each_kind_is_asked_in_its_own_way(shelf, kind):
    """Read, probe, sample; and so again with other weights."""
    made = Made(kind)
    with standing_in(made) as url:
        engine = engine_of(url)
        for number in (0, 1):
            made.asked.clear()
            samples = sample(engine, shelf, number)
            asked = [(path, body) for path, body in made.asked if body is not None]
            reading = READ[kind](str(shelf.version(number).folder))
            assert asked[: len(reading)] == reading
            probe, *texts = [body for path, body in asked[len(reading) :]]
            assert probe["prompt"] == shelf.version(number).probe().prompts and probe["max_tokens"] == 1
            texts.sort(key=lambda body: [prompt.tolist() for prompt in PROMPTS].index(body["prompt"]))
            assert [body.pop("seed", None) for body in texts] == SEEDS[kind]
            assert [body.pop("prompt") for body in texts] == [prompt.tolist() for prompt in PROMPTS]
            assert texts == [BY_NAME | OWN[kind]] * len(PROMPTS)
            assert [[len(s.tokens) for s in answers] for answers in samples] == [[NEW] * SAMPLES] * len(PROMPTS)


def test_ours_are_asked_as_they_always_were():
    body = {"prompt": [1], "number": 3, "seed": 7, "temperature": 1.0}
    assert KINDS["ringbpt"].asked(body) is body


@pytest.mark.parametrize("kind", READ)
def test_a_planted_stale_update_is_found(shelf, kind):
    with standing_in(Made(kind, stale=True)) as url:
        engine = engine_of(url)
        sample(engine, shelf, 0)
        with pytest.raises(UserError, match="stale weights") as error:
            sample(engine, shelf, 1)
    assert error.value.code == 3


@pytest.mark.parametrize("kind", READ)
def test_raw_log_probabilities_are_found(shelf, kind):
    with (
        standing_in(Made(kind, raw=True)) as url,
        pytest.raises(UserError, match=r"nats from the trainer's.* or kind of log-probabilities"),
    ):
        sample(engine_of(url), shelf, 0)


def test_a_cache_that_is_not_emptied_is_of_the_weights_before(shelf):
    with (
        standing_in(Made("vllm", emptied=False)) as url,
        pytest.raises(UserError, match=r"failed to read .*: /reset_prefix_cache.*'success': False"),
    ):
        sample(engine_of(url), shelf, 0)


def test_an_answer_that_was_broken_off_is_asked_again(shelf):
    made = Made("vllm", aborts=2)
    with standing_in(made) as url:
        samples = sample(engine_of(url), shelf, 0)
    assert made.aborts == 0 and {s.finish for answers in samples for s in answers} == {"length"}


def refused(made: Made, longest: int = 10) -> str:
    with standing_in(made) as url, pytest.raises(UserError) as error:
        HttpEngine([url], NEW, ENDS).find(longest)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_said_of_servers_that_cannot_sample():
    assert "'llamacpp': weights are handed over to ringbpt, vllm, sglang" in refused(Made("llamacpp"))
    other = Made("vllm")
    other.routes["/v1/models"] = lambda _: {"object": "list", "data": []}
    assert "is no server of OpenAI's routes" in refused(other)
    plain = Made("vllm")
    del plain.routes["/weight_info"]  # which it has in development mode alone
    assert "start it as VLLM_SERVER_DEV_MODE=1 vllm serve" in refused(plain)
    assert refused(Made("vllm"), 200).endswith("takes texts of 128 tokens, and a prompt with its answer has 200: "
                                               "start it with --max-model-len=200")  # fmt: skip
    assert refused(Made("sglang"), 200).endswith("--context-length=200")


def test_a_kind_that_is_only_met_later(shelf):
    """At the start it was away, and another server was there."""
    with standing_in(Made("vllm")) as there, standing_in(Made("ollama")) as strange:
        engine = engine_of(there)
        engine._servers.append(http_engine.Address(strange, "", 5.0))
        with pytest.raises(UserError, match="'ollama'"):
            sample(engine, shelf, 0)
