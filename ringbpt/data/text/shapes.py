"""Which of the known shapes an example has, and the same example as a conversation or as a prompt and its completion.

Nothing here tokenises. Shapes are told by the keys alone: see SHAPES.
"""

from difflib import get_close_matches
from typing import Any, NamedTuple

from ringbpt.config import TextProcessorConfig, UserError
from ringbpt.data.reading.files import json_type

Message = dict[str, Any]  # role, content, and what a template may know: tool_calls, name, ...

# Told apart in this order: the first whose keys an example has all of.
SHAPES: dict[str, tuple[str, ...]] = {
    "preference": ("chosen", "rejected"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "kto": ("prompt", "completion", "label"),
    "prompt_completion": ("prompt", "completion"),
    "text": ("text",),
    "rl": ("prompt",),
}
# What of an example of another kind is learnt as text, by which flag of text_processor.
AS_TEXT = {
    "preference": "output_key=chosen learns the chosen answers",
    "kto": "output_key=completion learns all completions",
    "rl": "output_key=KEY names the answer: a prompt alone has nothing to learn",
}
LEARNT_AS_TEXT = tuple(shape for shape in SHAPES if shape not in AS_TEXT)
# ShareGPT's speakers by their role; who is none of them is a role of that name.
SPEAKERS = {
    "user": ("human",),
    "assistant": ("gpt", "chatgpt", "bot", "function_call"),
    "tool": ("observation", "function_response"),
}
ROLES = {speaker: role for role, speakers in SPEAKERS.items() for speaker in speakers}


class Pair(NamedTuple):
    """What is given, without loss, and what is learnt; both texts, or both lists of messages."""

    prompt: Any
    completion: Any


def keys_of(config: TextProcessorConfig) -> dict[str, str]:
    """Our name of a key -> the example's, where the flags give it another one."""
    named = {
        "prompt": config.prompt_key or config.input_key,
        "completion": config.output_key,
        "chosen": config.chosen_key,
        "rejected": config.rejected_key,
        "label": config.label_key,
    }
    return {ours: theirs for ours, theirs in named.items() if theirs}


def detect(example: dict[str, Any], config: TextProcessorConfig, flag: str, where: Any) -> str:
    """The shape that the flags name, or else the example has. Raises UserError that names the keys it has."""
    if config.shape:
        return config.shape
    keys = keys_of(config)
    named = {ours: _get(example, theirs, where, f", the {ours} by the flags") for ours, theirs in keys.items()}
    if config.input_key and not config.output_key:
        return "messages" if isinstance(example[config.input_key], list) else "text"
    if config.output_key:  # said to be learnt, whatever else is there
        return "prompt_completion"
    renamed = {key: value for key, value in example.items() if value is not None} | named
    for shape, needed in SHAPES.items():
        if all(key in renamed for key in needed):
            if shape == "sharegpt" and "role" in _first(renamed["conversations"]):
                return "messages"
            return shape
    found = ", ".join(map(repr, example)) or "nothing"
    text = next((key for key, value in example.items() if isinstance(value, str)), "text")
    raise UserError(f"{where}: no shape that is known here in {found}: --{flag}.fields={text} names the text to learn")


def _first(messages: Any) -> Any:
    return messages[0] if isinstance(messages, list) and messages and isinstance(messages[0], dict) else {}


def conversation(example: dict[str, Any], shape: str, config: TextProcessorConfig, where: Any) -> list[Message]:
    """A "messages" or "sharegpt" example as messages with role and content."""
    if shape == "sharegpt":
        turns = _list(example, "conversations", where)
        found = []
        for turn in turns:
            if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
                raise UserError(f"{where}: a turn of 'conversations' without 'from' and 'value'")
            found.append({"role": ROLES.get(turn["from"], turn["from"]), "content": turn["value"]})
        if isinstance(example.get("system"), str) and example["system"] and found[0]["role"] != "system":
            found.insert(0, {"role": "system", "content": example["system"]})
        return check_messages(found, "conversations", where)
    key = config.input_key or ("messages" if "messages" in example else "conversations")
    return check_messages(_list(example, key, where), key, where)


def check_messages(messages: list[Any], key: str, where: Any) -> list[Message]:
    """Messages whose roles are text, without the keys that are null (tables fill rows up with them)."""
    checked = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"{where}: message {number} of {key!r} has no 'role'")
        message = {name: value for name, value in message.items() if value is not None}
        content = message.setdefault("content", "")
        if not isinstance(content, str | list):
            raise UserError(f"{where}: the content of message {number} of {key!r} is {json_type(content)}, not text")
        checked.append(message)
    return checked


def _list(example: dict[str, Any], key: str, where: Any) -> list[Any]:
    value = _get(example, key, where)
    if not isinstance(value, list) or not value:
        what = "empty" if isinstance(value, list) else json_type(value)
        raise UserError(f"{where}: field {key!r} is {what}; it must be a list of messages")
    return value


def _get(example: dict[str, Any], key: str, where: Any, named: str = "") -> Any:
    if key not in example:
        close = (get_close_matches(key, example, 1, 0.0) or ["nothing"])[0]
        raise UserError(f"{where}: no field {key!r}{named}; the nearest is {close!r}")
    return example[key]


def _text(example: dict[str, Any], key: str, where: Any) -> str:
    value = _get(example, key, where)
    if not isinstance(value, str):
        raise UserError(f"{where}: field {key!r} is {json_type(value)}; it must be a string")
    return value


def _text_or_messages(example: dict[str, Any], key: str, where: Any) -> Any:
    value = _get(example, key, where)
    return check_messages(value, key, where) if isinstance(value, list) else _text(example, key, where)


def prompt_and_completion(example: dict[str, Any], shape: str, config: TextProcessorConfig, where: Any) -> Pair:
    """An "alpaca", "prompt_completion" or "kto" example; texts, or messages on both sides."""
    if shape == "alpaca":
        return _alpaca(example, config, where)
    keys = keys_of(config)
    pair = Pair(*(_text_or_messages(example, keys.get(name, name), where) for name in ("prompt", "completion")))
    return _alike(pair, where)


def _alpaca(example: dict[str, Any], config: TextProcessorConfig, where: Any) -> Pair:
    prompt = _text(example, "instruction", where)
    if example.get("input"):
        prompt = f"{prompt}\n{_text(example, 'input', where)}"
    output = _text(example, "output", where)
    if not config.apply_chat_template:
        return Pair(prompt, output)
    messages: list[Message] = []
    if example.get("system"):
        messages.append({"role": "system", "content": _text(example, "system", where)})
    for turn in example.get("history") or []:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(side, str) for side in turn):
            raise UserError(f"{where}: 'history' must hold pairs of texts, what was asked and what was answered")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    messages.append({"role": "user", "content": prompt})
    return Pair(messages, [{"role": "assistant", "content": output}])


def _alike(pair: Pair, where: Any) -> Pair:
    """Messages on both sides where there are any on one."""
    prompt, completion = pair
    if isinstance(prompt, list) and isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if isinstance(prompt, str) and isinstance(completion, list):
        prompt = [{"role": "user", "content": prompt}] if prompt else []
    if not len(completion):
        raise UserError(f"{where}: the completion is empty; leave the example out")
    return Pair(prompt, completion)


def preference(example: dict[str, Any], config: TextProcessorConfig, where: Any) -> tuple[Pair, Pair, float]:
    """(prompt and chosen, prompt and rejected, margin) of a "preference" example.

    Without a prompt it is what both begin with: their common messages, or the common text.
    """
    keys = keys_of(config)
    chosen, rejected = (_text_or_messages(example, keys.get(name, name), where) for name in ("chosen", "rejected"))
    if type(chosen) is not type(rejected):
        raise UserError(f"{where}: 'chosen' is {json_type(chosen)} and 'rejected' is {json_type(rejected)}")
    key = keys.get("prompt", "prompt")
    if example.get(key) is not None:
        prompt = _text_or_messages(example, key, where)
    else:
        differ = (at for at, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
        prompt = chosen[: next(differ, min(len(chosen), len(rejected)))]
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    margin = example.get("margin")
    if margin is not None and not isinstance(margin, int | float):
        raise UserError(f"{where}: 'margin' is {json_type(margin)}; it must be a number")
    return _alike(Pair(prompt, chosen), where), _alike(Pair(prompt, rejected), where), float(margin or 0.0)
