"""`python -m ringbpt.serve`: a checkpoint behind OpenAI's routes, with token ids and log-probabilities, on any mesh.

--load_checkpoint=huggingface::DIR                      http://127.0.0.1:8000/v1/completions and /v1/chat/completions
--load_checkpoint=params::runs/<run> --port=0           at a free port, which is printed
--load_checkpoint=huggingface::DIR --host=0.0.0.0       for other machines; RINGBPT_API_KEY has the key that they give

Ctrl-C or SIGTERM: no new requests, those under way are answered, exit code 0; twice within a second:
at once.
"""

import ipaddress
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from ringbpt import ending
from ringbpt.config import Flag, UserError, printable, printed_help, read_flags, run_main, say
from ringbpt.config.fields import LARGEST_POSITION
from ringbpt.config.rollouts import KEY, api_key
from ringbpt.generate import MODEL_FLAGS, start_model

WAKE_SECONDS = 0.05
FLAGS = MODEL_FLAGS | {
    "host": Flag(str, "127.0.0.1", "the address to listen at; one that other machines reach demands a key"),
    "port": Flag(int, 8000, "the port; 0: a free one, which is printed", at_least=0, at_most=65535),
    "api_key": Flag(str, "", f"what `Authorization: Bearer` must say; empty: the variable {KEY}"),
    "batch_size": Flag(int, 32, "answers generated at a time", at_least=1, at_most=1 << 16),
    "max_new_tokens": Flag(int, 4096, "that a request may ask for", at_least=1, at_most=LARGEST_POSITION),
}


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    flags = read_flags(argv, FLAGS)
    key = api_key(flags["api_key"])
    if not key and not is_loopback(flags["host"]):
        raise UserError(f"--host={flags['host']} may be reached by others: give a key by {KEY}, or --host=127.0.0.1")
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise UserError("serving needs starlette and uvicorn: pip install 'ringbpt[serve]'") from None
    from ringbpt.checkpoint.load import describe_predicting
    from ringbpt.generation.text import find_tokenizer, make_chat_encoder

    found = describe_predicting(flags["load_checkpoint"])
    tokenizer = find_tokenizer(found, flags["tokenizer"], flags["chat_template"])
    encode = make_chat_encoder(tokenizer) if tokenizer.chat_template else None
    with bound(flags["host"], flags["port"]) as bound_to:
        return serve(flags, bound_to, key, tokenizer, encode)


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bound(host: str, port: int) -> socket.socket:
    """A socket of this address, which answers nobody yet. Raises UserError, code 4, where it cannot be had."""
    try:
        kind, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UserError(f"--host={host}: {getattr(error, 'strerror', None) or 'no address'}: 127.0.0.1 works") from None
    found = socket.socket(kind)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise UserError(f"--host={host} --port={port}: {error.strerror}; --port=0 takes a free one", code=4) from None
    return found


def serve(flags: dict[str, Any], bound_to: socket.socket, key: str, tokenizer: Any, encode: Any) -> int:
    """Until a signal ends it."""
    from uvicorn import Config, Server

    from ringbpt.generation.generator import Generator
    from ringbpt.serving.app import Serving
    from ringbpt.serving.asked import Limits
    from ringbpt.serving.weights import Weights
    from ringbpt.serving.worker import Worker

    model, params = start_model(flags)
    generator = Generator(model, params)
    weights = Weights(generator, params, flags["load_checkpoint"], flags["dtype"], flags["adapter"])
    del params
    name = Path(flags["load_checkpoint"].partition("::")[2]).name
    sizes = model.architecture
    limits = Limits(name, sizes.max_sequence_length, sizes.vocab_size, flags["max_new_tokens"], flags["batch_size"])
    worker = Worker(generator, tokenizer, flags["batch_size"])
    serving = Serving(worker, weights, tokenizer, encode, limits, key)
    server = Server(Config(serving.app(), lifespan="off", log_config=None, log_level="error", access_log=False))
    listening = threading.Thread(target=server.run, args=([bound_to],), name="http", daemon=True)

    last = -ending.TWICE_SECONDS

    def told(number: int, _: Any) -> None:
        nonlocal last
        twice, last = time.monotonic() - last < ending.TWICE_SECONDS, time.monotonic()
        if twice:
            ending.exit_now(128 + number, f"{signal.Signals(number).name} twice: at once")
        serving.end()
        server.should_exit = True

    for number in ending.STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as SIGHUP is under nohup
            signal.signal(number, told)
    listening.start()
    while not server.started and listening.is_alive():
        listening.join(WAKE_SECONDS)
    host, port = bound_to.getsockname()[:2]
    if server.started:
        say(printable(f"serving {name} on http://{f'[{host}]' if ':' in host else host}:{port}"))
    while listening.is_alive():  # a signal that another thread is given is heard of once this one wakes
        listening.join(WAKE_SECONDS)
    if not server.started and not server.should_exit:
        raise UserError(f"--port={port}: another program listens there; --port=0 takes a free one", code=4)
    worker.close()
    say(f"ended: {serving.answered:,} requests answered")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
