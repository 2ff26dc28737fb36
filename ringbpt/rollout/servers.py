"""Kinds of servers that sample for a run, by what they say of themselves: how each is told to read weights, and asked.

A request is written as `ringbpt.serve` takes it. Others get it with what they would else decide by themselves (a folder
may ask for top-p, and for ends of its own), and without what they do not know.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from ringbpt.config import UserError
from ringbpt.config.shown import one_line
from ringbpt.rollout.handover import Version

Body = dict[str, Any]


class Kind(NamedTuple):
    """start: the command. length: its flag for the longest text. reread: the requests by which it reads a version's
    folder, in this order. asked: what it is sent for a request of ours. needs: a route that it has only where it was
    started so that weights can be read.
    """

    start: str
    length: str
    reread: Callable[[Version], list[tuple[str, Body]]]
    asked: Callable[[Body], Body]
    needs: str = ""


# Sampling is from the whole distribution, and ends by stop_token_ids alone.
WHOLE = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "ignore_eos": True}


def _of_vllm(version: Version) -> list[tuple[str, Body]]:
    """Its cache of beginnings is of the weights before, and reading others does not empty it."""
    read = {"method": "reload_weights", "kwargs": {"weights_path": str(version.folder)}}
    return [("/collective_rpc", read), ("/reset_prefix_cache?reset_running_requests=true", {})]


def _for_vllm(body: Body) -> Body:
    """Answer i is drawn by seed + i there, whatever the prompt: the number of the first one is added, so that no two
    answers of a rollout have one seed. Tokens as ids, for a server without a tokenizer has no other names for them.
    """
    own = {"seed": body["seed"] + body.get("number", 0), "return_tokens_as_token_ids": True}
    return {name: value for name, value in body.items() if name != "number"} | WHOLE | own


def _for_sglang(body: Body) -> Body:
    """Without a seed: where it heeds one, all answers to a prompt have the same, and are the same."""
    kept = {name: value for name, value in body.items() if name not in ("number", "seed")}
    return kept | WHOLE | {"no_stop_trim": True}


KINDS = {
    "ringbpt": Kind(
        start="python -m ringbpt.serve --load_checkpoint=huggingface::DIR",
        length="--max_sequence_length",
        reread=lambda version: [
            ("/update_weights_from_disk", {"model_path": str(version.folder), "version": version.number})
        ],
        asked=lambda body: body,
    ),
    "vllm": Kind(
        start="VLLM_SERVER_DEV_MODE=1 vllm serve DIR --logprobs-mode=processed_logprobs",
        length="--max-model-len",
        reread=_of_vllm,
        asked=_for_vllm,
        needs="/weight_info",
    ),
    "sglang": Kind(
        start="python -m sglang.launch_server --model-path=DIR",
        length="--context-length",
        reread=lambda version: [("/update_weights_from_disk", {"model_path": str(version.folder)})],
        asked=_for_sglang,
    ),
}


def kind_of(url: str, about: Any) -> Kind:
    """about: the answer of its /v1/models. Raises UserError for one of no kind that is known."""
    try:
        owner = about["data"][0]["owned_by"]
    except (KeyError, IndexError, TypeError):
        raise UserError(
            f"--rollout.servers={url}: it is no server of OpenAI's routes, as ringbpt.serve is, vLLM and SGLang"
        ) from None
    if owner not in KINDS:
        raise UserError(
            f"--rollout.servers={url} is of a kind that is not known, {one_line(repr(owner), 60)}: weights are handed "
            f"over to {', '.join(KINDS)}: {KINDS['ringbpt'].start}"
        )
    return KINDS[owner]
