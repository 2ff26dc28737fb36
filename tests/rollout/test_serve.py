"""A server in a process of its own, asked by OpenAI's client and by a trainer's engine: tokens are the local ones."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import openai
import pytest

from ringbpt.checkpoint.load import load_model
from ringbpt.config import UserError
from ringbpt.rollout import http_engine as http_engine_module
from ringbpt.rollout.engine import LocalEngine, Sample
from ringbpt.rollout.handover import Shelf
from ringbpt.rollout.http_engine import HttpEngine
from tests.golden.make_families import restore

ROOT = Path(__file__).parents[2]
LETTERS = "".join(map(chr, range(32, 127))) + "\n"
TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}\n{% endfor %}a: "
PROMPTS = [np.array(tokens, np.int32) for tokens in ([5, 9, 11], [7], [4, 4, 8, 30, 31, 32, 33], [90] * 70)]
END, NEW = 66, 12


def model_folder(folder: Path, scale: float = 1.0) -> Path:
    """A model with the 96 characters above as its vocabulary. scale: of its head, for other weights of one model."""
    from safetensors.numpy import load_file, save_file
    from tokenizers import Tokenizer, decoders, models

    restore("llama3", folder)
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(LETTERS)}, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"clean_up_tokenization_spaces": False}))
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"][:: 1 if scale == 1 else -1] * np.float32(scale)
    save_file({name: np.ascontiguousarray(w) for name, w in weights.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return model_folder(tmp_path_factory.mktemp("a") / "tiny")


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    return model_folder(tmp_path_factory.mktemp("b") / "other", scale=1.5)


class Server:
    """`python -m ringbpt.serve`, ready."""

    def __init__(self, folder: Path, *flags: str, key: str = ""):
        command = [sys.executable, "-m", "ringbpt.serve", f"--load_checkpoint=huggingface::{folder}"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "RINGBPT_API_KEY": key}
        flags = flags if any(flag.startswith("--port=") for flag in flags) else (*flags, "--port=0")
        self.process = subprocess.Popen(
            [*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.said: list[str] = []
        assert self.process.stdout
        for line in self.process.stdout:
            self.said.append(line)
            if line.startswith("serving "):
                break
        else:
            raise AssertionError(self.process.communicate())
        self.url = self.said[-1].split(" on ")[1].strip()

    def ask(self, path: str, body: Any = None, method: str = "", **headers: str) -> tuple[int, Any]:
        """(status, JSON). body: bytes as they are."""
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | {k.replace("_", "-"): v for k, v in headers.items()}
        request = Request(self.url + path, content, headers, method=method or None)
        try:
            with urlopen(request, timeout=60) as response:
                return response.status, json.loads(response.read())
        except HTTPError as error:
            return error.code, json.loads(error.read())

    def post(self, path: str, **body: Any) -> Any:
        status, found = self.ask(path, body)
        assert status == 200, found
        return found

    def ended(self) -> tuple[int, str, str]:
        """What it says once it has ended, and its exit code first."""
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@contextmanager
def serving(folder: Path, *flags: str, key: str = "") -> Iterator[Server]:
    server = Server(folder, *flags, key=key)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Server]:
    with serving(folder, "--max_new_tokens=200") as server:
        yield server
        server.process.send_signal(signal.SIGTERM)
        code, out, err = server.ended()
        assert (code, err) == (0, "") and out.splitlines()[-1].startswith("ended: ")


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def local_engine(folder: Path) -> tuple[Any, Any, LocalEngine]:
    model, params = load_model(f"huggingface::{folder}", (1, 1, 1, 1))
    engine = LocalEngine(model, longest=70, max_new_tokens=NEW, ends=frozenset({END}))
    engine.update(params)
    return model, params, engine


@pytest.fixture(scope="module")
def local(folder) -> tuple[Any, Any, LocalEngine]:
    return local_engine(folder)


@pytest.fixture(scope="module")
def drawn(local) -> list[list[Sample]]:
    return local[2].generate(PROMPTS, 3, 0.8, seed=7)


def flat(samples: list[list[Sample]]) -> list[Sample]:
    return [sample for answers in samples for sample in answers]


def assert_same(found: list[list[Sample]], wanted: list[list[Sample]]) -> None:
    assert [len(answers) for answers in found] == [len(answers) for answers in wanted]
    for ours, theirs in zip(flat(found), flat(wanted), strict=True):
        assert (ours.tokens, ours.finish) == (theirs.tokens, theirs.finish)
        np.testing.assert_allclose(ours.logps, theirs.logps, atol=1e-4)


def http_engine(*servers: Server, **more: Any) -> HttpEngine:
    return HttpEngine([server.url for server in servers], NEW, frozenset({END}), **more)


# --- one server ---


def test_its_samples_are_those_of_the_local_engine(server, drawn):
    assert_same(http_engine(server).generate(PROMPTS, 3, 0.8, seed=7), drawn)
    assert {s.finish for s in flat(drawn)} == {"stop", "length"}


def test_greedy_completions_by_openais_client(server, client, local):
    [[wanted], *_] = local[2].generate(PROMPTS[:1], 1, 0.0, seed=0)
    text = "".join(LETTERS[t] for t in wanted.tokens)
    ids = PROMPTS[0].tolist()
    asked = {"model": "tiny", "max_tokens": len(wanted.tokens), "temperature": 0, "logprobs": 0}
    for prompt in ("".join(LETTERS[t] for t in ids), ids):
        found = client.completions.create(prompt=prompt, extra_body={"return_token_ids": True}, **asked)
        [choice] = found.choices
        assert choice.text == text and choice.token_ids == wanted.tokens and choice.prompt_token_ids == ids
        assert choice.logprobs.tokens == [*text] and choice.logprobs.text_offset == [*range(len(text))]
        np.testing.assert_allclose(choice.logprobs.token_logprobs, wanted.logps, atol=1e-4)
        assert found.usage.total_tokens == len(ids) + len(text)
    chunks = [*client.completions.create(prompt=ids, stream=True, stream_options={"include_usage": True}, **asked)]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == text and len(chunks) == len(text) + 1
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(text) - 1) + ["length"]
    assert chunks[-1].usage.completion_tokens == len(text)
    stop = text[5:7]
    cut = text.partition(stop)[0]
    for stream in (False, True):
        answer = client.completions.create(prompt=ids, stop=[stop, "never said"], stream=stream, **asked)
        pieces = [piece.choices[0] for piece in answer] if stream else [answer.choices[0]]
        assert "".join(piece.text for piece in pieces) == cut and pieces[-1].finish_reason == "stop"


def test_chats_by_openais_client(client):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "seed": 3, "n": 2}
    found = client.chat.completions.create(logprobs=True, extra_body={"return_token_ids": True}, **asked)
    assert found.prompt_token_ids == [LETTERS.index(c) for c in "u: hi\na: "]
    for number, choice in enumerate(found.choices):
        assert choice.index == number and choice.message.role == "assistant" and choice.finish_reason == "length"
        assert choice.message.content == "".join(LETTERS[t] for t in choice.token_ids)
        assert [each.token for each in choice.logprobs.content] == [*choice.message.content]
    texts = ["", ""]
    for chunk in client.chat.completions.create(stream=True, **asked):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [choice.message.content for choice in found.choices] and texts[0] != texts[1]


def test_a_text_depends_on_its_seed_and_number_alone(client):
    """Not on which others are asked for, in the same request or beside it, by whatever options."""
    ids = [prompt.tolist() for prompt in PROMPTS[:3]]
    asked = {"model": "tiny", "max_tokens": 8, "n": 2, "extra_body": {"return_token_ids": True}}
    whole = [c.token_ids for c in client.completions.create(prompt=ids, seed=2**32 - 1, **asked).choices]
    found: dict[int, Any] = {}

    def ask(number: int, **more: Any) -> None:
        body = {"return_token_ids": True, "number": 2 * number}
        answer = client.completions.create(prompt=ids[number % 3], **asked | {"extra_body": body} | more)
        found[number] = [choice.token_ids for choice in answer.choices]

    several = [({"seed": 2**32 - 1}, number) for number in range(3)]
    several += [({"seed": 1, "top_p": 0.5, "temperature": 2.0}, 3), ({"seed": 1, "extra_body": {"top_k": 3}}, 4)]
    threads = [threading.Thread(target=ask, args=(number,), kwargs=more) for more, number in several[:4]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] + found[1] + found[2] == whole


BAD: dict[str, tuple[dict[str, Any] | bytes, str]] = {
    "no JSON": (b"{", "malformed JSON"),
    "deep": (b'{"prompt": ' + b"[" * 5000 + b"]" * 5000 + b"}", "malformed"),
    "no object": (b"[]", "JSON object"),
    "no number": (b'{"prompt": "a", "temperature": NaN}', "malformed"),
    "half a pair": (b'{"prompt": "\\ud800"}', "surrogate"),
    "no prompt": ({}, "prompt must be"),
    "an empty prompt": ({"prompt": ""}, "no tokens"),
    "no ids": ({"prompt": []}, "no tokens"),
    "ids below 0": ({"prompt": [-1]}, "token ids"),
    "ids that are none": ({"prompt": [1.5]}, "token ids"),
    "ids of another vocabulary": ({"prompt": [96]}, "vocabulary of 96"),
    "mixed": ({"prompt": ["a", 3]}, "prompt must be"),
    "too long": ({"prompt": [1] * 512}, "511 at most"),
    "too much": ({"prompt": [1] * 400, "max_tokens": 150}, "max_tokens=112"),
    "more than a request may": ({"max_tokens": 201}, "between 1 and 200"),
    "no tokens": ({"max_tokens": 0}, "between 1 and"),
    "true tokens": ({"max_tokens": True}, "no whole number"),
    "n": ({"n": 33}, "between 1 and 32"),
    "cold": ({"temperature": -1}, "temperature=0"),
    "hot": ({"temperature": "hot"}, "no number"),
    "top_p": ({"top_p": 0}, "top_p"),
    "seed": ({"seed": 2**32}, "seed"),
    "numbers that end above": ({"number": 2**32 - 1, "n": 2}, "number"),
    "a seed of digits": (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", "malformed"),
    "stop": ({"stop": [""]}, "stop"),
    "logprobs": ({"logprobs": 5}, "logprobs"),
    "echo": ({"echo": True}, "echo"),
    "penalty": ({"frequency_penalty": 0.5}, "not done here"),
    "a name": ({"max_token": 3}, "did you mean max_tokens?"),
    "control characters": ({"\x1b[31m": 3}, r"\x1b"),
    "stream": ({"stream": "yes"}, "neither true nor false"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_requests(server, name):
    body, said = BAD[name]
    status, found = server.ask("/v1/completions", body if isinstance(body, bytes) else {"prompt": "a"} | body)
    if body == {}:
        status, found = server.ask("/v1/completions", {})
    error = found["error"]
    assert status == 400 and said in error["message"] and error["type"] == "invalid_request_error"
    assert len(error["message"]) <= 520 and "Traceback" not in error["message"]


def test_other_refusals(server):
    ask = server.ask
    for path, body, status in (
        ("/v1/embeddings", {}, 404), ("/", None, 404), ("/v1/completions", None, 405), ("/health", {}, 405),
        ("/v1/completions", {"prompt": "a", "model": "gpt-4"}, 404),
        ("/v1/chat/completions", {"messages": [{"content": "a"}]}, 400),
        ("/v1/chat/completions", {"messages": 3}, 400), ("/v1/chat/completions", {"prompt": "a"}, 400),
        ("/update_weights_from_disk", {}, 400), ("/update_weights_from_disk", {"model_path": "/nowhere"}, 400),
        ("/update_weights_from_disk", {"load_checkpoint": "x::y"}, 400),
        ("/update_weights_from_disk", {"model_path": "a\0b"}, 400),
    ):  # fmt: skip
        found = ask(path, body)
        assert found[0] == status and found[1]["error"]["message"], (path, body, found)
    assert ask("/v1/completions", b"a" * ((1 << 26) + 1))[0] == 413
    assert ask("/v1/completions", {"prompt": "a"}, Content_Type="text/plain")[0] == 415
    assert ask("/pause", {}, Origin="https://a.page")[0] == 403
    assert ask("/v1/completions", {"prompt": "a"}, Host="a.page:80")[0] == 403
    status, found = ask("/health")
    assert (status, found["status"]) == (200, "ok")
    assert ask("/v1/models")[1]["data"][0]["id"] == "tiny"
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as raw:
        raw.sendall(b"no HTTP\r\n\r\n")
        assert b"400" in raw.recv(100)


def test_pause_and_resume(server):
    server.post("/pause")
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(server.post("/v1/completions", prompt="a", max_tokens=2)))
    asking.start()
    deadline = time.monotonic() + 30
    while (status := server.ask("/health")[1])["waiting"] < 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert status == {"status": "paused", "waiting": 1} and not answers
    server.post("/resume")
    asking.join(60)
    assert answers and server.ask("/health")[1] == {"status": "ok", "waiting": 0}


@pytest.fixture
def versions(tmp_path, folder, other, local) -> tuple[Shelf, Any]:
    """Version 0, what is served at first, and version 1, of other weights; and an engine with these."""
    ours, theirs = local, local_engine(other)
    settings = json.loads((folder / "config.json").read_text())
    found = Shelf(tmp_path, ours[0], "fp32", settings, PROMPTS[2])
    for number, params in enumerate((ours[1], theirs[1])):
        found.put(number, params)
    return found, theirs[2]


def test_updates_are_read_and_probed(server, versions, drawn):
    (shelf, other_engine), engine = versions, http_engine(server)
    before = server.ask("/weight_info")[1]
    for number, wanted in ((1, other_engine.generate(PROMPTS, 3, 0.8, seed=7)), (0, drawn)):
        engine.update(shelf.version(number))
        assert_same(engine.generate(PROMPTS, 3, 0.8, seed=7), wanted)
        after = server.ask("/weight_info")[1]
        assert after["version"] == number and str(shelf.version(number).folder) in after["source"]
        assert (after["fingerprint"] == before["fingerprint"]) == (number == 0)


def test_twenty_updates_are_probed(server, versions, local):
    """Each a little apart from the last; what a server says after each is within 1e-4 of the trainer's."""
    (shelf, _), (_, params, _) = versions, local
    engine = http_engine(server)
    for number in range(2, 22):
        moved = params | {"unembed": params["unembed"] * (1 + 0.01 * number)}
        shelf.put(number, moved)
        engine.update(shelf.version(number))
        engine.generate(PROMPTS[:1], 1, 1.0, seed=0)
        said = engine._servers[0].said
        assert server.ask("/weight_info")[1]["version"] == number
        assert np.abs(said.trainers - said.logps).max() < 1e-4
        shelf.drop_before(number)
    engine.update(shelf.version(21))
    shelf.put(0, params)
    engine.update(shelf.version(0))
    engine.generate(PROMPTS[:1], 1, 1.0, seed=0)


@pytest.mark.parametrize("step", (0.5, 0.004), ids=("far", "near"))
def test_a_stale_server_is_found_at_once(server, versions, local, step):
    """It says that it has read the folder, and has not: far from the trainer, or as near as any that has."""
    (shelf, _), (_, params, _) = versions, local
    said: list[str] = []
    engine = http_engine(server, say=said.append)
    engine.update(shelf.version(0))
    engine.generate(PROMPTS[:1], 1, 1.0, seed=0)
    shelf.put(7, params | {"unembed": params["unembed"] * (1 + step)})
    [address] = engine._servers
    ask = address.ask
    address.ask = lambda path, *more, **named: {} if path == "/update_weights_from_disk" else ask(path, *more, **named)
    engine.update(shelf.version(7))
    with pytest.raises(UserError, match="stale weights") as error:
        engine.generate(PROMPTS[:1], 1, 1.0, seed=0)
    assert error.value.code == 3 and "\n" not in str(error.value) and "asked no more" in said[-1]


def test_a_folder_that_is_damaged_is_refused(server, versions):
    shelf, _ = versions
    file = shelf.version(1).folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    status, found = server.ask("/update_weights_from_disk", {"model_path": str(file.parent)})
    assert status == 400 and "model.safetensors: it is damaged" in found["error"]["message"]


def test_another_model_is_refused(server, tmp_path):
    restore("llama3.2", tmp_path / "bigger")
    before = server.ask("/weight_info")[1]
    status, found = server.ask("/update_weights_from_disk", {"model_path": str(tmp_path / "bigger")})
    assert status == 400 and "is another model: its " in found["error"]["message"]
    assert server.ask("/weight_info")[1] == before
    assert server.post("/v1/completions", prompt="a", max_tokens=2)["choices"][0]["text"]


def test_what_a_server_refuses_ends_a_rollout(server):
    with pytest.raises(UserError, match="511 at most") as error:
        http_engine(server).generate([np.ones(600, np.int32)], 1, 1.0, seed=0)
    assert error.value.code == 3


def test_no_server_is_left(server):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        engine = HttpEngine(
            [f"http://127.0.0.1:{nobody.getsockname()[1]}"], 4, frozenset(), seconds=1.0, say=lambda _: None
        )
        with pytest.raises(UserError, match="no server has been up for 1 s") as error:
            engine.generate(PROMPTS, 1, 1.0, seed=0)
    assert error.value.code == 3


def test_a_server_that_always_fails(monkeypatch):
    """Its health is good, and none of its answers is."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self, status: int = 200) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(b'{"error": {"message": "out of\\nmemory"}, "data": [{"owned_by": "ringbpt"}]}')

        def do_POST(self) -> None:
            self.do_GET(500)

        def log_message(self, *_: Any) -> None:
            pass

    monkeypatch.setattr(http_engine_module, "PERIOD_SECONDS", 0.01)
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as failing:
        threading.Thread(target=failing.serve_forever, daemon=True).start()
        said: list[str] = []
        engine = HttpEngine([f"http://127.0.0.1:{failing.server_port}"], 4, frozenset(), say=said.append)
        with pytest.raises(UserError, match="failed 5 times: 500: out of memory") as error:
            engine.generate(PROMPTS[:1], 1, 1.0, seed=0)
        failing.shutdown()
    assert error.value.code == 3 and len(said) >= 4


# --- servers of their own ---


def test_a_key_and_a_graceful_end(folder, server):
    """A request is under way, streamed, and another waits: both are answered; a new one is not."""
    with serving(folder, "--host=127.0.0.1", "--batch_size=1", key="geheim") as own:
        body = {"prompt": "a", "max_tokens": 300, "seed": 1, "temperature": 1.0}
        for given in ("", "Bearer other", "geheim2", "Bearer gehéim"):
            assert own.ask("/v1/completions", body, Authorization=given)[0] == 401
        assert own.ask("/health")[0] == 200
        keyed = openai.OpenAI(base_url=f"{own.url}/v1", api_key="geheim", max_retries=0)
        stream = iter(keyed.completions.create(model="tiny", stream=True, **body))
        text = next(stream).choices[0].text
        waiting: list[Any] = []
        ask = lambda: waiting.append(keyed.completions.create(model="tiny", **body | {"max_tokens": 5}))
        thread = threading.Thread(target=ask)
        thread.start()
        while own.ask("/health")[1]["waiting"] < 1:
            time.sleep(0.02)
        own.process.send_signal(signal.SIGTERM)
        text += "".join(chunk.choices[0].text for chunk in stream)
        thread.join(60)
        assert len(text) == 300 and text.startswith(waiting[0].choices[0].text)
        code, out, err = own.ended()
        assert (code, err) == (0, "") and out.endswith("ended: 2 requests answered\n")
        with pytest.raises(openai.APIConnectionError):
            keyed.models.list()


def test_signals_that_follow_each_other_end_it_at_once(folder):
    """Two within a second; as many as it takes, for a busy machine may be late to hear of the first."""
    with serving(folder) as own:
        own.post("/pause")
        body = json.dumps({"prompt": "a", "max_tokens": 500}).encode()
        waiting = Request(f"{own.url}/v1/completions", body, {"Content-Type": "application/json"})

        def refused() -> None:
            with pytest.raises((OSError, HTTPException)):
                urlopen(waiting, timeout=60)

        thread = threading.Thread(target=refused)
        thread.start()
        while own.ask("/health")[1]["waiting"] < 1:
            time.sleep(0.02)
        while own.process.poll() is None:
            own.process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
        code, _, err = own.ended()
        thread.join(60)
    assert code == 143 and err.endswith("twice: at once\n") and err.count("\n") == 1


def test_a_lost_server_changes_nothing(folder, server, local):
    prompts = [np.array([5 + i, 9, 11], np.int32) for i in range(40)]
    wanted = local[2].generate(prompts, 2, 1.0, seed=3)
    said: list[str] = []
    with serving(folder, "--batch_size=2") as lost:
        engine = http_engine(server, lost, say=said.append)
        engine.find(3 + NEW)
        killing = threading.Timer(0.3, lost.process.kill)
        killing.start()
        found = engine.generate(prompts, 2, 1.0, seed=3)
        killing.join()
        assert lost.process.wait(10) == -signal.SIGKILL
    assert_same(found, wanted)
    assert any("asked again" in line for line in said)
    assert_same(engine.generate(prompts[:4], 2, 1.0, seed=3), wanted[:4])  # with one server that is gone


def test_a_port_that_is_taken(folder, server):
    port = server.url.rpartition(":")[2]
    command = [sys.executable, "-m", "ringbpt.serve", f"--load_checkpoint=huggingface::{folder}", f"--port={port}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 4 and "--port=0 takes a free one" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_requests_are_batched(folder):
    """32 of unequal length, at once and one by one: the fastest of several rounds, for what a round compiles depends on
    who comes first. All have room in sizes that differ by their rows alone.
    """
    rng = np.random.default_rng(0)
    sizes = rng.integers((3, 65), (60, 129), (32, 2)).tolist()
    bodies = [
        {"prompt": rng.integers(0, 96, prompt).tolist(), "max_tokens": answer, "seed": i}
        for i, (prompt, answer) in enumerate(sizes)
    ]
    found: dict[int, Any] = {}

    def ask(*numbers: int) -> None:
        for number in numbers:
            found[number] = own.post("/v1/completions", **bodies[number])["choices"][0]["text"]

    def seconds(askers: list[threading.Thread]) -> float:
        found.clear()
        start = time.perf_counter()
        for thread in askers:
            thread.start()
        for thread in askers:
            thread.join()
        return time.perf_counter() - start

    rounds = []
    with serving(folder, "--mesh_dim=1,1,1,1") as own:
        for _ in range(6):
            together = seconds([threading.Thread(target=ask, args=(i,)) for i in range(32)])
            batched = dict(found)
            alone = seconds([threading.Thread(target=ask, args=range(32))])
            assert found == batched and len(found) == 32
            rounds.append((together, alone))
    together, alone = map(min, zip(*rounds, strict=True))
    print(f"32 requests: {together:.2f} s at once, {alone:.2f} s one by one: {together / alone:.2f}; {rounds}")
    assert together <= 0.5 * alone
