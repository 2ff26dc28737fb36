"""What a request asks for, by OpenAI's names: read from its JSON, or refused with a reason.

Beside OpenAI's: top_k, min_p and repetition_penalty; return_token_ids and stop_token_ids, as vLLM has them; and
`number`, of the first answer among those of its seed: text i of a rollout is drawn by (seed, i) wherever it is asked
for.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ringbpt.config import UserError, nearest_name
from ringbpt.config.foreign import shown
from ringbpt.data.prompts import encode_prompt
from ringbpt.data.text.tokenizers import Tokenizer
from ringbpt.generation.sampling import Sampling

MOST_STOPS, STOP_LENGTH = 16, 1000
LARGEST_SEED = 2**32 - 1
SAMPLING = {"temperature": (float, 1.0), "top_p": (float, 1.0), "top_k": (int, 0), "min_p": (float, 0.0)} | {
    "repetition_penalty": (float, 1.0)
}
BOTH = {
    "model", "max_tokens", "n", "seed", "stop", "stop_token_ids", "number", "logprobs", "stream", "stream_options",
    "return_token_ids", *SAMPLING,
}  # fmt: skip
OF_COMPLETIONS = BOTH | {"prompt", "echo"}
OF_CHATS = BOTH | {"messages", "tools", "chat_template_kwargs", "max_completion_tokens", "top_logprobs"}
# What clients send along and does not say how the text is to be, and what says so and must be as it is here.
LET_BE = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,), "presence_penalty": (0,), "logit_bias": ({},), "best_of": (1,), "suffix": ("",),
    "response_format": ({"type": "text"},), "tool_choice": ("auto", "none"),
}  # fmt: skip


class Refused(Exception):
    """A request that gets no answer but this. param: whose value it is about."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


@dataclass(frozen=True)
class Limits:
    """name: the model's. length: prompt and answer together. new_tokens: of an answer. texts: of a batch."""

    name: str
    length: int
    vocab_size: int
    new_tokens: int
    texts: int


class Asked(NamedTuple):
    """A request that has been understood. logprobs, usage, token_ids: tell these too."""

    prompts: list[np.ndarray]
    samples: int
    sampling: Sampling
    number: int
    max_tokens: list[int]  # of each prompt
    stops: list[str]
    ends: frozenset[int]
    logprobs: bool
    token_ids: bool
    stream: bool
    usage: bool


def read_request(
    body: Any, tokenizer: Tokenizer, encode: Callable[..., np.ndarray] | None, limits: Limits, chat: bool
) -> Asked:
    """Raises Refused. encode: of conversations, None where the tokenizer has no template; chat: whether this is one."""
    if not isinstance(body, dict):
        raise Refused("the body must be a JSON object")
    body = {name: value for name, value in body.items() if value is not None}
    _check_names(body, OF_CHATS if chat else OF_COMPLETIONS)
    if body.get("model", limits.name) != limits.name:
        raise Refused(f"no model {shown(body['model'])} is served: {limits.name} is", "model", 404, "model_not_found")
    prompts = [_conversation(body, encode)] if chat else _prompts(body.get("prompt"), tokenizer)
    for prompt in prompts:
        if int(prompt.max()) >= limits.vocab_size or int(prompt.min()) < 0:
            raise Refused(f"a token is outside of the vocabulary of {limits.vocab_size}", "prompt")
    options = body.get("stream_options", {})
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise Refused('stream_options may have "include_usage"', "stream_options")
    samples = _whole(body, "n", 1, 1, limits.texts)
    return Asked(
        prompts,
        samples,
        _sampling(body),
        _whole(body, "number", 0, 0, LARGEST_SEED + 1 - samples * len(prompts)),
        [_max_tokens(body, len(prompt), limits, chat) for prompt in prompts],
        _stops(body.get("stop", [])),
        tokenizer.ends.stop | frozenset(_ids(body.get("stop_token_ids", []), "stop_token_ids")),
        _logprobs(body, chat),
        _truth(body, "return_token_ids"),
        _truth(body, "stream"),
        _truth(options, "include_usage"),
    )


def _check_names(body: dict[str, Any], known: set[str]) -> None:
    for name, value in body.items():
        if name in NEUTRAL and value in NEUTRAL[name]:
            continue
        if name in NEUTRAL:
            raise Refused(f"{name}={shown(value)} is not done here: leave it out", name)
        if name not in known | LET_BE:
            raise Refused(
                f"{shown(name)} is no field of this request: did you mean {nearest_name(name, sorted(known))}?", name
            )
    if _truth(body, "echo"):
        raise Refused("echo is not done here: ask for return_token_ids, and put the prompt before the text", "echo")


def _whole(body: dict[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = body.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise Refused(f"{name}={shown(value)} is no whole number between {least} and {most}", name)
    return value


def _truth(body: dict[str, Any], name: str) -> bool:
    if not isinstance(value := body.get(name, False), bool):
        raise Refused(f"{name}={shown(value)} is neither true nor false", name)
    return value


def _sampling(body: dict[str, Any]) -> Sampling:
    found: dict[str, Any] = {}
    for name, (kind, default) in SAMPLING.items():
        value = body.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
            raise Refused(f"{name}={shown(value)} is no {'whole ' if kind is int else ''}number", name)
        try:
            found[name] = kind(value)
            Sampling(**{name: found[name]})
        except (UserError, OverflowError) as error:
            raise Refused(str(error).replace("--", ""), name) from None
    seed = _whole(body, "seed", secrets.randbelow(LARGEST_SEED), 0, LARGEST_SEED)
    return Sampling(**found, seed=seed)


def _max_tokens(body: dict[str, Any], length: int, limits: Limits, chat: bool) -> int:
    """Of an answer to a prompt of this length: by default 16 as OpenAI has it, in a chat whatever there is room for."""
    room = limits.length - length
    name = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    if room < 1:
        raise Refused(
            f"a prompt of {length} tokens fills the model's {limits.length}: {limits.length - 1} at most",
            "messages" if chat else "prompt",
            code="context_length_exceeded",
        )
    count = _whole(body, name, min(room, limits.new_tokens, limits.length if chat else 16), 1, limits.new_tokens)
    if count > room:
        raise Refused(
            f"a prompt of {length} tokens and {name}={count} are above the model's {limits.length}: {name}={room}",
            name,
            code="context_length_exceeded",
        )
    return count


def _ids(value: Any, name: str) -> list[int]:
    if not isinstance(value, list) or not all(type(token) is int and -1 < token < 2**31 for token in value):
        raise Refused(f"{name} must be a list of token ids", name)
    return value


def _prompts(value: Any, tokenizer: Tokenizer) -> list[np.ndarray]:
    """A text, several, a list of token ids, or several of these."""
    several = value if isinstance(value, list) and value and isinstance(value[0], str | list) else [value]
    found = []
    for prompt in several:
        if isinstance(prompt, str):
            try:
                found.append(encode_prompt({"prompt": prompt}, tokenizer, None, "prompt"))
            except UserError as error:
                raise Refused(str(error), "prompt") from None
        elif not isinstance(prompt, list):
            raise Refused("prompt must be a text, a list of texts, a list of token ids, or a list of these", "prompt")
        elif not prompt:
            raise Refused("prompt has no tokens: write something", "prompt")
        else:
            found.append(np.array(_ids(prompt, "prompt"), np.int32))
    return found


def _conversation(body: dict[str, Any], encode: Callable[..., np.ndarray] | None) -> np.ndarray:
    if encode is None:
        raise Refused(
            "this model's tokenizer has no chat template: ask /v1/completions, or start the server with "
            "--chat_template=chatml",
            "messages",
        )
    row = {name: body[name] for name in ("messages", "tools", "chat_template_kwargs") if name in body}
    if not isinstance(row.get("messages"), list):
        raise Refused("messages must be a list of objects with role and content", "messages")
    try:
        found = encode_prompt(row, None, encode, "messages")  # type: ignore[arg-type]
    except UserError as error:
        raise Refused(str(error), "messages") from None
    if not len(found):
        raise Refused("messages have no tokens by the model's chat template", "messages")
    return found


def _stops(value: Any) -> list[str]:
    stops: Sequence[Any] = [value] if isinstance(value, str) else value
    if (
        not isinstance(stops, list)
        or len(stops) > MOST_STOPS
        or not all(isinstance(stop, str) and 0 < len(stop) <= STOP_LENGTH for stop in stops)
    ):
        raise Refused(f"stop must be a text, or a list of {MOST_STOPS} texts at most; none is empty", "stop")
    return list(stops)


def _logprobs(body: dict[str, Any], chat: bool) -> bool:
    """Whether the log-probability of each token is told; those of tokens that were not drawn never are."""
    others = body.get("top_logprobs", 0) if chat else 0
    if type(others) is not int or others != 0:
        raise Refused("top_logprobs: only the tokens that were drawn have log-probabilities here", "top_logprobs")
    if chat:
        return _truth(body, "logprobs")
    value = body.get("logprobs", False)
    if value is not False and (isinstance(value, bool) or not isinstance(value, int) or value not in (0, 1)):
        raise Refused("logprobs may be 0 or 1: the log-probability of each token that was drawn is told", "logprobs")
    return value is not False
