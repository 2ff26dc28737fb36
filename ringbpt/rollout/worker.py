"""A user's file in a process of its own: `python -m ringbpt.rollout.worker FILE NAME KIND`. In comes a list of
JSON objects a line, and out goes an object a line, each as soon as it is known.

KIND "reward": in comes {"prompt", "completion", "row"}, out goes {"reward": number}. KIND "environment": in comes
{"id", "row"} and out goes {"messages", "tools"}, or in comes {"id", "row", "messages"}, a conversation so far, and out
goes {"messages", "reward", "done"}. Where that fails, {"error": text}. What the file prints goes to the terminal, and
no jax is started here.
"""

import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable
from typing import Any

Answers = Callable[[dict[str, Any]], dict[str, Any]]


def rewards(function: Any) -> Answers:
    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        return {"reward": finite(function(**asked))}

    return answer


def environments(make: Any) -> Answers:
    """An object of each id's own. One that is not there, since its process has ended, is made by the same calls."""
    there: dict[int, Any] = {}

    def answer(asked: dict[str, Any]) -> dict[str, Any]:
        number, row, messages = asked["id"], asked["row"], asked.get("messages")
        if messages is None:
            there[number] = make()
            return {"messages": there[number].reset(row), "tools": getattr(there[number], "tools", None)}
        if number not in there:
            there[number] = make()
            first = there[number].reset(row)
            for end in range(len(first) + 1, len(messages)):
                if messages[end - 1]["role"] == "assistant":
                    there[number].step(messages[:end])
        more, reward, done = there[number].step(messages)
        if done not in (True, False):
            raise ValueError(f"done is {done!r}, which is neither True nor False")
        return {"messages": more, "reward": finite(reward), "done": bool(done)}

    return answer


def finite(reward: Any) -> float:
    if not math.isfinite(number := float(reward)):
        raise ValueError(f"the reward is {number}")
    return number


KINDS = {"reward": rewards, "environment": environments}


def main(file: str, name: str, kind: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        spec = importlib.util.spec_from_file_location(kind, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        answer = KINDS[kind](getattr(module, name))
        answers.write("{}\n")
    except BaseException as error:  # whatever a stranger's file raises, SystemExit too
        answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        return
    finally:
        answers.flush()
    for line in sys.stdin:
        for asked in json.loads(line):
            try:
                found = json.dumps(answer(asked))
            except Exception as error:
                found = json.dumps({"error": f"{type(error).__name__}: {error}"})
            answers.write(found + "\n")
            answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
