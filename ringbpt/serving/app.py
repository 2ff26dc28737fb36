"""The routes: OpenAI's completions and chats, and what a trainer asks of a server whose weights it renews.

Whatever is asked, the answer is JSON; an error is OpenAI's {"error": {"message", "type", "param", "code"}}.
"""

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from itertools import accumulate, count
from typing import Any

from ringbpt.config import UserError, complain
from ringbpt.config.foreign import parse_json, shown
from ringbpt.config.shown import one_line
from ringbpt.data.text.tokenizers import Tokenizer
from ringbpt.serving.asked import Asked, Limits, Refused, read_request
from ringbpt.serving.weights import Weights
from ringbpt.serving.worker import News, Row, Worker

BODY_BYTES = 1 << 26
MOST_WAITING = 10_000  # prompts
LISTEN_SECONDS = 1.0  # how often it is looked whether a client still listens
LOCAL = ("127.0.0.1", "localhost", "[::1]")


class Serving:
    """Answers requests by a worker; `api_key` empty: whoever reaches it may ask."""

    def __init__(
        self,
        worker: Worker,
        weights: Weights,
        tokenizer: Tokenizer,
        encode: Callable[..., Any] | None,
        limits: Limits,
        api_key: str,
    ):
        """encode: of conversations, None where the tokenizer has no template."""
        self._worker, self._weights, self._tokenizer, self._encode = worker, weights, tokenizer, encode
        self._limits, self._api_key = limits, api_key
        self.answered, self._ending, self._since = 0, False, int(time.time())

    def app(self) -> Any:
        """The ASGI application."""
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.routing import Route

        routes: dict[str, tuple[str, Callable[[Any], Awaitable[Any]]]] = {
            "/health": ("GET", self._health),
            "/v1/models": ("GET", self._models),
            "/weight_info": ("GET", self._weight_info),
            "/v1/completions": ("POST", lambda http: self._generate(http, chat=False)),
            "/v1/chat/completions": ("POST", lambda http: self._generate(http, chat=True)),
            "/update_weights_from_disk": ("POST", self._update),
            "/pause": ("POST", lambda http: self._pause(True)),
            "/resume": ("POST", lambda http: self._pause(False)),
        }

        async def unknown(http: Any, error: Any) -> Any:
            there = ", ".join(f"{method} {path}" for path, (method, _) in routes.items())
            what = f"{http.method} {shown(http.url.path)} is not served here: {there} are"
            return failure(Refused(what, status=error.status_code))

        return Starlette(
            routes=[Route(path, self._guarded(act), methods=[method]) for path, (method, act) in routes.items()],
            exception_handlers={HTTPException: unknown},
        )

    def end(self) -> None:
        """No new requests; those that wait are answered, whoever has paused the server."""
        self._ending = True
        self._worker.pause(False)

    def _guarded(self, act: Callable[[Any], Awaitable[Any]]) -> Callable[[Any], Awaitable[Any]]:
        """The route behind its checks; whatever it raises is an answer too."""

        async def endpoint(http: Any) -> Any:
            try:
                self._check(http)
                if self._ending and http.url.path != "/health":
                    raise Refused("the server is about to end", status=503)
                return await act(http)
            except Refused as refused:
                return failure(refused)
            except Exception as error:
                complain(f"{http.url.path}: {type(error).__name__}: {one_line(error)}")
                return failure(Refused(f"{type(error).__name__}: {one_line(error)}", status=500))

        return endpoint

    def _check(self, http: Any) -> None:
        """Who asks. Without a key, only programs of this machine: a web page that its browser shows is none."""
        if self._api_key:
            given = http.headers.get("authorization", "").removeprefix("Bearer ")
            if http.url.path != "/health" and not hmac.compare_digest(given.encode(), self._api_key.encode()):
                raise Refused("the API key is missing or wrong: Authorization: Bearer <key>", status=401)
            return
        host = http.headers.get("host", "").rsplit(":", 1)[0]
        if host not in LOCAL or http.headers.get("origin"):
            raise Refused("a server without an API key answers no web page, and no name but its own", status=403)

    # --- what is generated ---

    async def _generate(self, http: Any, chat: bool) -> Any:
        from starlette.responses import StreamingResponse

        body = await read_body(http)
        asked = await asyncio.to_thread(
            read_request, body, self._tokenizer, self._encode, self._limits, chat
        )  # a long prompt takes a while, and others are answered meanwhile
        if self._worker.waiting + len(asked.prompts) > MOST_WAITING:
            raise Refused(f"{MOST_WAITING} prompts are waiting: ask again later", status=429)
        news: asyncio.Queue[tuple[int, News]] = asyncio.Queue()
        rows = self._rows(asked, news)
        self._worker.submit(rows)
        reply = Reply(asked, self._limits.name, self._tokenizer, chat)
        if asked.stream:
            return StreamingResponse(self._streamed(reply, rows, news), media_type="text/event-stream")
        try:
            waiting: asyncio.Task | None = None
            while not reply.over:
                waiting = waiting or asyncio.ensure_future(news.get())
                done, _ = await asyncio.wait([waiting], timeout=LISTEN_SECONDS)
                if done:
                    reply.add(*waiting.result())
                    waiting = None
                elif await http.is_disconnected():
                    waiting.cancel()
                    raise Refused("the client is gone", status=499)
        finally:
            cancel(rows)
        self.answered += 1
        return answer(reply.whole())

    async def _streamed(
        self, reply: "Reply", rows: list[Row], news: asyncio.Queue[tuple[int, News]]
    ) -> AsyncIterator[str]:
        try:
            for chunk in reply.opening():
                yield event(chunk)
            while not reply.over:
                number, new = await news.get()
                reply.add(number, new)
                yield event(reply.chunk(number, new))
            if reply.asked.usage:
                yield event(reply.last_chunk())
            yield "data: [DONE]\n\n"
            self.answered += 1
        except Refused as refused:
            yield event(error_of(refused))
        finally:
            cancel(rows)

    def _rows(self, asked: Asked, news: asyncio.Queue[tuple[int, News]]) -> list[Row]:
        loop, n, draw = asyncio.get_running_loop(), asked.samples, asked.sampling

        def tell(first: int) -> Callable[[int, News], None]:
            def told(number: int, new: News) -> None:
                with suppress(RuntimeError):  # the loop is closed, and nobody listens
                    loop.call_soon_threadsafe(news.put_nowait, (first + number, new))

            return told

        rows = []
        for first, prompt, most in zip(count(0, n), asked.prompts, asked.max_tokens, strict=False):
            how = draw, asked.number + first, most, asked.stops, asked.ends, asked.stream
            rows.append(Row(prompt, n, *how, tell(first)))
        return rows

    # --- the rest ---

    async def _health(self, _: Any) -> Any:
        alive = self._worker.alive and not self._ending
        status = "paused" if self._worker.paused else "ok"
        return answer({"status": status if alive else "ending", "waiting": self._worker.waiting}, 200 if alive else 503)

    async def _models(self, _: Any) -> Any:
        about = {"id": self._limits.name, "object": "model", "created": self._since, "owned_by": "ringbpt"}
        return answer({"object": "list", "data": [about | {"max_model_len": self._limits.length}]})

    async def _weight_info(self, _: Any) -> Any:
        return answer(self._weights.info())

    async def _update(self, http: Any) -> Any:
        body = await read_body(http)
        try:
            load = self._weights.loading(body)
            info = await asyncio.wrap_future(self._worker.call(load))
        except UserError as error:
            raise Refused(str(error)) from None
        return answer(info | {"success": True})

    async def _pause(self, paused: bool) -> Any:
        """Answers when no batch is under way."""
        self._worker.pause(paused)
        if paused:
            await asyncio.wrap_future(self._worker.call(lambda: None))
        return answer({"paused": paused})


class Reply:
    """OpenAI's objects for one request: what has come of each of its answers so far."""

    def __init__(self, asked: Asked, model: str, tokenizer: Tokenizer, chat: bool):
        self.asked, self._chat, self._tokenizer = asked, chat, tokenizer
        whole = len(asked.prompts) * asked.samples
        self._texts: list[list[str]] = [[] for _ in range(whole)]
        self._tokens: list[list[int]] = [[] for _ in range(whole)]
        self._logps: list[list[float]] = [[] for _ in range(whole)]
        self._finish = [""] * whole
        kind = "chat.completion" if chat else "text_completion"
        name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._head = {"id": name, "object": kind, "created": int(time.time()), "model": model}

    @property
    def over(self) -> bool:
        return all(self._finish)

    def add(self, number: int, new: News) -> None:
        """Raises Refused where an answer has failed."""
        if new.error:
            raise Refused(new.error, status=500)
        self._texts[number].append(new.text)
        self._tokens[number] += new.tokens
        self._logps[number] += new.logps
        self._finish[number] = new.finish

    def whole(self) -> dict[str, Any]:
        choices = []
        for i, texts in enumerate(self._texts):
            news = News("".join(texts), self._tokens[i], self._logps[i], self._finish[i])
            said = {"message": {"role": "assistant", "content": news.text}} if self._chat else {"text": news.text}
            choices.append(self._choice(i, news, said, first=True))
        return self._head | {"choices": choices, "usage": self._usage()} | self._of_chats()

    def opening(self) -> list[dict[str, Any]]:
        """The chunks that say whose turn it is, in a chat."""
        if not self._chat:
            return []
        empty = News("", [], [])
        said = {"delta": {"role": "assistant", "content": ""}}
        return [self._chunk([self._choice(i, empty, said)]) | self._of_chats() for i in range(len(self._texts))]

    def chunk(self, number: int, new: News) -> dict[str, Any]:
        said = {"delta": {"content": new.text}} if self._chat else {"text": new.text}
        return self._chunk([self._choice(number, new, said, first=len(self._tokens[number]) == 1)])

    def last_chunk(self) -> dict[str, Any]:
        return self._chunk([]) | {"usage": self._usage()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._head | {"object": f"{self._head['object']}{'.chunk' * self._chat}", "choices": choices}

    def _choice(self, number: int, new: News, said: dict[str, Any], first: bool = False) -> dict[str, Any]:
        found = {"index": number, "finish_reason": new.finish or None, "logprobs": None} | said
        if self.asked.logprobs and new.tokens:
            found["logprobs"] = self._logprobs(new)
        if self.asked.token_ids:
            found["token_ids"] = new.tokens
            if first and not self._chat:
                found["prompt_token_ids"] = self.asked.prompts[number // self.asked.samples].tolist()
        return found

    def _of_chats(self) -> dict[str, Any]:
        """A chat's prompt, which is one: as vLLM has it, beside the choices."""
        return {"prompt_token_ids": self.asked.prompts[0].tolist()} if self._chat and self.asked.token_ids else {}

    def _logprobs(self, new: News) -> dict[str, Any]:
        names = [self._tokenizer.decode([token], True) for token in new.tokens]
        if self._chat:
            pairs = zip(names, new.logps, strict=True)
            of_each = [{"token": n, "logprob": p, "bytes": [*n.encode()], "top_logprobs": []} for n, p in pairs]
            return {"content": of_each, "refusal": None}
        offsets = [*accumulate(map(len, names[:-1]), initial=0)]
        return {"tokens": names, "token_logprobs": new.logps, "top_logprobs": None, "text_offset": offsets}

    def _usage(self) -> dict[str, int]:
        given, drawn = sum(map(len, self.asked.prompts)), sum(map(len, self._tokens))
        return {"prompt_tokens": given, "completion_tokens": drawn, "total_tokens": given + drawn}


async def read_body(http: Any) -> Any:
    """The JSON of a request. Raises Refused for what is none, or too much."""
    if http.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused("the body must be JSON, and Content-Type: application/json say so", status=415)
    pieces, size = list[bytes](), 0
    async for piece in http.stream():
        size += len(piece)
        if size > BODY_BYTES:
            raise Refused(f"a body of more than {BODY_BYTES} bytes", status=413)
        pieces.append(piece)
    try:
        return parse_json(b"".join(pieces), "the body", numbered=False)
    except UserError as error:
        raise Refused(str(error)) from None


def cancel(rows: list[Row]) -> None:
    for row in rows:
        row.cancelled = True


def event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def answer(value: dict[str, Any], status: int = 200) -> Any:
    from starlette.responses import JSONResponse

    return JSONResponse(value, status)


KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_of(refused: Refused) -> dict[str, Any]:
    kind = KINDS.get(refused.status, "server_error" if refused.status >= 500 else "invalid_request_error")
    # No line of it is longer than a terminal's reader would have it, nor holds what a terminal obeys.
    return {"error": {"message": one_line(refused, 500), "type": kind, "param": refused.param, "code": refused.code}}


def failure(refused: Refused) -> Any:
    return answer(error_of(refused), refused.status)
