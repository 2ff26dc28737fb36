"""A reward function in a process of its own: `python -m ringbpt.rollout.worker FILE NAME`, a JSON object a line.

In comes {"prompt", "completion", "row"}, out goes {"reward": number} or {"error": text}. What the function prints goes
to the terminal, and no jax is started here.
"""

import importlib.util
import json
import math
import os
import sys


def main(file: str, name: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        spec = importlib.util.spec_from_file_location("reward", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        function = getattr(module, name)
        answers.write("{}\n")
    except BaseException as error:  # whatever a stranger's file raises, SystemExit too
        answers.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        return
    finally:
        answers.flush()
    for line in sys.stdin:
        try:
            reward = float(function(**json.loads(line)))
            found = {"reward": reward} if math.isfinite(reward) else {"error": f"the reward is {reward}"}
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(found) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
