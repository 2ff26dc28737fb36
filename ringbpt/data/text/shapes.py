"""Which of the known shapes an example has, and the same example as a conversation or as a prompt and its completion.

Nothing here tokenises. Shapes are told by the keys alone: see SHAPES.
"""

import json
from difflib import get_close_matches
from typing import Any, NamedTuple

from ringbpt.config import TextProcessorConfig, UserError
from ringbpt.config.foreign import check_depth, is_finite
from ringbpt.data.reading.files import json_type

Message = dict[str, Any]  # role, content, and what a template may know: tool_calls, name, ...; weight and train

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
        found = [_sharegpt_turn(turn, number, where) for number, turn in enumerate(turns)]
        if isinstance(example.get("system"), str) and example["system"] and found[0]["role"] != "system":
            found.insert(0, {"role": "system", "content": example["system"]})
        return check_messages(found, "conversations", where)
    key = config.input_key or ("messages" if "messages" in example else "conversations")
    return check_messages(_list(example, key, where), key, where)


def _sharegpt_turn(turn: Any, number: int, where: Any) -> Message:
    if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
        raise UserError(f"{where}: a turn of 'conversations' without 'from' and 'value'")
    speaker, value = turn["from"], turn["value"]
    if not isinstance(speaker, str):
        raise UserError(f"{where}: 'from' of turn {number} of 'conversations' is {json_type(speaker)}, not text")
    rest = {key: item for key, item in turn.items() if key not in ("from", "value")}
    message = rest | {"role": ROLES.get(speaker, speaker), "content": value}
    if speaker == "function_call":
        call = _parsed(value, f"{where}: turn {number} of 'conversations', a function_call,")
        calls = call if isinstance(call, list) else [call]
        message |= {"content": "", "tool_calls": [{"type": "function", "function": call} for call in calls]}
    return message


def check_messages(messages: list[Any], key: str, where: Any) -> list[Message]:
    """Messages whose roles and contents are text, and whose tool calls' arguments are objects.

    Tables fill rows up with nulls, which are taken off wherever they name nothing: keys of a message, of its parts, its
    calls and their arguments. Raises UserError for what is no message.
    """
    checked = []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"{where}: message {number} of {key!r} has no 'role'")
        message = without_nulls(message)
        content = message.setdefault("content", "")
        if not isinstance(content, str | list):
            raise UserError(f"{where}: the content of message {number} of {key!r} is {json_type(content)}, not text")
        if message.get("function_call"):  # one call, as they once were
            message.setdefault("tool_calls", [{"type": "function", "function": message.pop("function_call")}])
        if "tool_calls" in message:
            message["tool_calls"] = _calls(message["tool_calls"], f"{where}: message {number} of {key!r}")
        checked.append(message)
    return checked


def without_nulls(value: Any) -> Any:
    """The same without the keys of objects that are null, at any depth: a table cannot tell them from missing ones."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _parsed(value: Any, where: str) -> Any:
    """What JSON text means; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        raise UserError(f"{where} is text that is no JSON: {value[:40]!r}") from None
    check_depth(found, where)
    return found


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls, each {"name", "arguments"} or that as its "function", with an object as arguments."""
    calls = _parsed(calls, f"{where}: tool_calls") or []
    if not isinstance(calls, list):
        raise UserError(f"{where}: tool_calls is {json_type(calls)}, not an array")
    found = []
    for call in calls:
        call = _parsed(call, f"{where}: a tool call")
        inner = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise UserError(f"{where}: a tool call without a name")
        arguments = inner.get("arguments")
        arguments = _parsed(arguments, f"{where}: the arguments of {inner['name']!r}") if arguments else {}
        if not isinstance(arguments, dict):
            kind = json_type(arguments)
            raise UserError(f"{where}: the arguments of {inner['name']!r} are {kind}; they must be an object")
        inner = inner | {"arguments": arguments}
        found.append(call | {"function": inner} if "function" in call else inner)
    return found


def tools_of(example: dict[str, Any], where: Any) -> list[Any] | None:
    """The tools of an example, whose `tools` may be JSON text, as may each of them; None where there are none."""
    tools = _parsed(example.get("tools") or None, f"{where}: field 'tools'")
    if isinstance(tools, dict):
        tools = [tools]
    if tools is not None and not isinstance(tools, list):
        raise UserError(f"{where}: field 'tools' is {json_type(tools)}; it must be a list of tools")
    found = [_parsed(tool, f"{where}: a tool") for tool in without_nulls(tools or [])]
    if wrong := [tool for tool in found if not isinstance(tool, dict)]:
        raise UserError(f"{where}: a tool is {json_type(wrong[0])}; it must be an object")
    return found or None


def settings_of(example: dict[str, Any], where: Any) -> dict[str, Any]:
    """What an example hands to its chat template besides messages and tools: its `chat_template_kwargs`."""
    settings = _parsed(example.get("chat_template_kwargs") or None, f"{where}: field 'chat_template_kwargs'")
    if settings is not None and not isinstance(settings, dict):
        raise UserError(f"{where}: field 'chat_template_kwargs' is {json_type(settings)}; it must be an object")
    return without_nulls(settings or {})


def trained(messages: list[Message], roles: tuple[str, ...], where: Any) -> list[int]:
    """The numbers of the messages that take loss: of these roles, unless `weight: 0` or `train: false` says no."""
    return [
        number
        for number, message in enumerate(messages)
        if _takes_loss(message, f"{where}: message {number}") and message["role"] in roles
    ]


def _takes_loss(message: Message, where: str) -> bool:
    weight, train = message.get("weight", 1), message.get("train", True)
    if weight not in (0, 1):
        raise UserError(f"{where} has weight {weight!r}: a turn takes loss (1) or none (0)")
    if train not in (True, False):
        raise UserError(f"{where} has train {train!r}: it must be true or false")
    return bool(weight) and bool(train)


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
    prompt, completion = (_text_or_messages(example, keys.get(name, name), where) for name in ("prompt", "completion"))
    return alike(prompt, completion, where)


def answers_of(example: dict[str, Any], shape: str, config: TextProcessorConfig, where: Any) -> list[Pair]:
    """An example as prompt and completion, once for each of its completions where they are a list of texts, or of lists
    of messages."""
    key = keys_of(config).get("completion", "completion")
    given = example.get(key) if shape == "prompt_completion" else None
    if not isinstance(given, list) or not given or not all(isinstance(each, str | list) for each in given):
        return [prompt_and_completion(example, shape, config, where)]
    return [prompt_and_completion(example | {key: each}, shape, config, where) for each in given]


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
    turns = example.get("history") or []
    for turn in turns if isinstance(turns, list) else [turns]:
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(side, str) for side in turn):
            raise UserError(f"{where}: 'history' must hold pairs of texts, what was asked and what was answered")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    messages.append({"role": "user", "content": prompt})
    return Pair(messages, [{"role": "assistant", "content": output}])


def alike(prompt: Any, completion: Any, where: Any) -> Pair:
    """Messages on both sides where there are any on one. Raises UserError where nothing is answered."""
    if isinstance(prompt, list) and isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if isinstance(prompt, str) and isinstance(completion, list):
        prompt = [{"role": "user", "content": prompt}] if prompt else []
    if not len(completion):
        raise UserError(f"{where}: the completion is empty; leave the example out")
    return Pair(prompt, completion)


def desirable(example: dict[str, Any], config: TextProcessorConfig, where: Any) -> bool:
    """The label of a "kto" example."""
    key = keys_of(config).get("label", "label")
    label = _get(example, key, where)
    if label not in (True, False):
        raise UserError(f"{where}: {key!r} is {label!r}; it must be true (desirable) or false")
    return bool(label)


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
    if margin is not None and not (type(margin) in (int, float) and is_finite(margin)):
        raise UserError(f"{where}: 'margin' is {json_type(margin)}; it must be a number")
    return alike(prompt, chosen, where), alike(prompt, rejected, where), float(margin or 0.0)
