"""Which weights get a low-rank pair, of which rank and scale: `--lora.*`, in the words of PEFT.

A module's name is that of Hugging Face's: "q_proj", or whole, "model.layers.0.self_attn.q_proj".
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from ringbpt.config.fields import Architecture, LoraConfig
from ringbpt.config.values import UserError, nearest_name, read_literals

ATTENTION = {"q_proj": "w_q", "k_proj": "w_k", "v_proj": "w_v", "o_proj": "w_o"}
FEEDFORWARD = {"gate_proj": "w_gate", "up_proj": "w_up", "down_proj": "w_down"}
MODULES = ATTENTION | FEEDFORWARD  # theirs -> ours
ALL = "all-linear"
REFUSED = {
    "embed_tokens": "the embedding is looked up and not multiplied with",
    "lm_head": "the vocabulary's head is computed in chunks of its own",
}


def module_name(module: str, layer: int) -> str:
    """The whole name of a module: model.layers.3.mlp.up_proj."""
    return f"model.layers.{layer}.{'self_attn' if module in ATTENTION else 'mlp'}.{module}"


def is_named(pattern: str, name: str) -> bool:
    """Whether a key of PEFT's rank_pattern or alpha_pattern means the module of this whole name."""
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None


def pairs_of(lora: LoraConfig, architecture: Architecture) -> tuple[tuple[str, int, float], ...]:
    """(our weight, rank, scale) of each pair, in the order of MODULES; () without LoRA.

    Raises UserError for modules that are none, for patterns that cannot be read, and for those that tell layers apart:
    layers are stacked, so each has the same pairs.
    """
    if not lora.rank:
        return ()
    if architecture.num_experts:
        raise UserError(
            f"--lora.rank={lora.rank} does not go with experts (--llama.num_experts={architecture.num_experts}), whose "
            "weights have no pairs: leave it out"
        )
    layers = range(architecture.num_hidden_layers)
    ranks, alphas = (_pattern(name, getattr(lora, name)) for name in ("rank_pattern", "alpha_pattern"))
    found = []
    for module, weight in MODULES.items():
        names = [module_name(module, layer) for layer in layers]
        if not _alike(
            "--lora.target_modules", lora.target_modules, [_is_target(lora.target_modules, n) for n in names]
        ):
            continue
        alpha = lora.rank if lora.alpha is None else lora.alpha
        rank = _alike("--lora.rank_pattern", lora.rank_pattern, [valued(ranks, n, lora.rank) for n in names])
        alpha = _alike("--lora.alpha_pattern", lora.alpha_pattern, [valued(alphas, n, alpha) for n in names])
        if type(rank) is not int or rank < 1:
            raise UserError(f"--lora.rank_pattern={lora.rank_pattern}: {rank!r} is no rank: a whole number from 1")
        found.append((weight, rank, alpha / (math.sqrt(rank) if lora.rslora else rank)))
    if not found:
        raise UserError(f"--lora.target_modules={lora.target_modules} names no module: some of {', '.join(MODULES)}")
    return tuple(found)


def _is_target(text: str, name: str) -> bool:
    """Whether --lora.target_modules means this module: all-linear, names with commas, or a pattern of whole names."""
    if text == ALL:
        return True
    words = [word.strip() for word in text.split(",")]
    for word in words:
        if word in REFUSED:
            raise UserError(
                f"--lora.target_modules={text}: {word} can have no pair: {REFUSED[word]}; leave it out, or {ALL}"
            )
    if all(word in MODULES for word in words):
        return name.rpartition(".")[2] in words
    if re.fullmatch(r"[\w, ]*", text):
        wrong = next(word for word in words if word not in MODULES)
        raise UserError(
            f"--lora.target_modules={text}: {wrong!r} is none of {', '.join(MODULES)}: did you mean "
            f"{nearest_name(wrong, MODULES)}?"
        )
    try:
        return re.fullmatch(text, name) is not None
    except re.error as error:
        raise UserError(f"--lora.target_modules={text} is no pattern: {error}; names with commas, or {ALL}") from None


def _pattern(name: str, text: str) -> dict[str, Any]:
    """{"q_proj": 8} of --lora.rank_pattern or --lora.alpha_pattern."""
    found = read_literals(f"--lora.{name}", text)
    for key, value in found.items():
        try:
            re.compile(key)
        except re.error as error:
            raise UserError(f"--lora.{name}: {key!r} is no pattern: {error}") from None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
            raise UserError(f"--lora.{name}: {key!r} is {value!r}: a number above 0")
    return found


def valued(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
    """What a rank_pattern or alpha_pattern says of the module of this whole name."""
    return next((value for pattern, value in patterns.items() if is_named(pattern, name)), default)


def _alike(flag: str, text: str, values: list[Any]) -> Any:
    """The value of all layers."""
    if len(set(values)) > 1:
        other = next(layer for layer, value in enumerate(values) if value != values[0])
        raise UserError(f"{flag}={text} tells layer 0 from layer {other}: layers are stacked, and have the same pairs")
    return values[0]
