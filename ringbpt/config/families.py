"""The families of Hugging Face models, as data: what their config.json means in our flags, and the table of tensors.

One table serves both ways: a row names our param, their tensor ({L} the layer, {E} the expert) and the pattern from
theirs to ours, whose sides are swapped to go back. It stands at the bottom of the house, and imports no jax, because
the command line reads a model's sizes from its config.json before anything else happens.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ringbpt.config.fields import Architecture
from ringbpt.config.values import UserError


class TensorRow(NamedTuple):
    ours: str
    theirs: str
    pattern: str


_ATTENTION = (
    TensorRow("layers.attention_norm", "model.layers.{L}.input_layernorm.weight", "D -> D"),
    TensorRow("layers.w_q", "model.layers.{L}.self_attn.q_proj.weight", "(N H) D -> D N H"),
    TensorRow("layers.w_k", "model.layers.{L}.self_attn.k_proj.weight", "(K H) D -> D K H"),
    TensorRow("layers.w_v", "model.layers.{L}.self_attn.v_proj.weight", "(K H) D -> D K H"),
    TensorRow("layers.w_o", "model.layers.{L}.self_attn.o_proj.weight", "D (N H) -> N H D"),
    TensorRow("layers.feedforward_norm", "model.layers.{L}.post_attention_layernorm.weight", "D -> D"),
)
_FEEDFORWARD = (
    TensorRow("layers.w_gate", "model.layers.{L}.mlp.gate_proj.weight", "F D -> D F"),
    TensorRow("layers.w_up", "model.layers.{L}.mlp.up_proj.weight", "F D -> D F"),
    TensorRow("layers.w_down", "model.layers.{L}.mlp.down_proj.weight", "D F -> F D"),
)
_EXPERTS = (
    TensorRow("layers.w_router", "model.layers.{L}.block_sparse_moe.gate.weight", "E D -> D E"),
    TensorRow("layers.w_gate", "model.layers.{L}.block_sparse_moe.experts.{E}.w1.weight", "F D -> D F"),
    TensorRow("layers.w_up", "model.layers.{L}.block_sparse_moe.experts.{E}.w3.weight", "F D -> D F"),
    TensorRow("layers.w_down", "model.layers.{L}.block_sparse_moe.experts.{E}.w2.weight", "D F -> F D"),
)
_BIASES = (
    TensorRow("layers.b_q", "model.layers.{L}.self_attn.q_proj.bias", "(N H) -> N H"),
    TensorRow("layers.b_k", "model.layers.{L}.self_attn.k_proj.bias", "(K H) -> K H"),
    TensorRow("layers.b_v", "model.layers.{L}.self_attn.v_proj.bias", "(K H) -> K H"),
)
_QK_NORMS = (
    TensorRow("layers.q_norm", "model.layers.{L}.self_attn.q_norm.weight", "H -> H"),
    TensorRow("layers.k_norm", "model.layers.{L}.self_attn.k_norm.weight", "H -> H"),
)
_ENDS = (
    TensorRow("embed", "model.embed_tokens.weight", "V D -> V D"),
    TensorRow("norm", "model.norm.weight", "D -> D"),
    TensorRow("unembed", "lm_head.weight", "V D -> D V"),
)
# Tensors of a file that are no weights, or are one of the others again (lm_head beside a tied embedding).
IGNORED = ("lm_head.weight", ".rotary_emb.inv_freq")


@dataclass(frozen=True)
class Family:
    """One architecture. fixed: flags that it sets by its mere name; reads: its own keys of config.json -> our flags;
    optional: flags that a model of it may use beyond LLaMA's; writes: keys that transformers wants to see besides."""

    model_type: str
    rows: tuple[TensorRow, ...]
    fixed: dict[str, Any] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    writes: dict[str, Any] = field(default_factory=dict)


_NO_BIAS = {"attention_bias": False}
FAMILIES: dict[str, Family] = {
    # LLaMA 1, 2, 3, 3.1, 3.2, CodeLlama, and whoever else has the same architecture.
    "LlamaForCausalLM": Family("llama", _ENDS + _ATTENTION + _FEEDFORWARD, writes=_NO_BIAS | {"mlp_bias": False}),
    "MistralForCausalLM": Family(
        "mistral", _ENDS + _ATTENTION + _FEEDFORWARD, reads={"sliding_window": "sliding_window"},
        optional=("sliding_window",),
    ),
    "Qwen2ForCausalLM": Family(
        "qwen2", _ENDS + _ATTENTION + _BIASES + _FEEDFORWARD, {"qkv_bias": True}, optional=("sliding_window",)
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3", _ENDS + _ATTENTION + _QK_NORMS + _FEEDFORWARD, {"qk_norm": True}, optional=("sliding_window",),
        writes=_NO_BIAS,
    ),
    "MixtralForCausalLM": Family(
        "mixtral", _ENDS + _ATTENTION + _EXPERTS,
        reads={
            "sliding_window": "sliding_window",
            "num_local_experts": "num_experts",
            "num_experts_per_tok": "num_experts_per_tok",
            "router_aux_loss_coef": "router_aux_loss_coef",
        },
        optional=("sliding_window",),
    ),
}  # fmt: skip

_READS = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_sequence_length",
    "rms_norm_eps": "rms_norm_eps",
    "initializer_range": "initializer_range",
    "tie_word_embeddings": "tie_word_embeddings",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}
_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# What a config.json may say that our model does not do, and the only value that it does.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0.0, 0, None),
    "partial_rotary_factor": (1.0, 1, None),
    "quantization_config": (None,),
}
# rope_parameters / rope_scaling -> our flags, by type.
_ROPE: dict[str, dict[str, str]] = {
    "": {},
    "linear": {"factor": "rope_scaling_factor"},
    "llama3": {
        "factor": "rope_scaling_factor",
        "low_freq_factor": "rope_scaling_low_freq_factor",
        "high_freq_factor": "rope_scaling_high_freq_factor",
        "original_max_position_embeddings": "rope_scaling_original_length",
    },
    "yarn": {
        "factor": "rope_scaling_factor",
        "beta_fast": "rope_scaling_beta_fast",
        "beta_slow": "rope_scaling_beta_slow",
        "truncate": "rope_scaling_truncate",
        "attention_factor": "rope_scaling_attention_factor",
        "original_max_position_embeddings": "rope_scaling_original_length",
    },
}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises UserError with file and line."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{file}:{getattr(error, 'lineno', 1)}: malformed JSON; copy it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}:1: it must hold a JSON object")
    return value


def find_family(settings: dict[str, Any], where: str) -> tuple[str, Family]:
    """(architecture, Family) of a config.json. Raises UserError for code of its own and for another architecture."""
    if "auto_map" in settings:
        raise UserError(f"{where}: auto_map: this model needs code of its author's, which is never run here")
    names = settings.get("architectures") or []
    name = names[0] if isinstance(names, list) and names else None
    if name is None:  # a bare config without weights, or one written by hand
        types = {family.model_type: name for name, family in FAMILIES.items()}
        name = types.get(settings.get("model_type", ""), settings.get("model_type"))
    if name not in FAMILIES:
        raise UserError(f"{where}: architecture {name!r} is none of {', '.join(FAMILIES)}")
    return name, FAMILIES[name]


def llama_fields(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """config.json, of either generation, -> the flags below `llama.` that describe the model.

    Raises UserError, with `where` as the culprit, for what our model does not do.
    """
    _, family = find_family(settings, where)
    for key, allowed in _ONLY.items():
        if settings.get(key) not in allowed:
            raise UserError(f"{where}: {key}={settings[key]!r} is not supported: only {allowed[0]!r} is")
    for key in _NEEDED:
        if not isinstance(settings.get(key), int):
            raise UserError(f"{where}: {key}={settings.get(key)!r} is no whole number")
    found = {}
    for key, ours in (_READS | family.reads).items():
        value = settings.get(key)
        if isinstance(value, list):  # several ends: the first; generation reads them all from generation_config.json
            value = value[0] if value else None
        if value is not None:
            found[ours] = value
    found |= family.fixed | _rope_fields(settings, where)
    if family.model_type.startswith("qwen"):
        found["sliding_window"] = _qwen_window(settings, where)
    for name in ("sliding_window", "head_dim", "num_key_value_heads"):  # another model's must not shine through
        found.setdefault(name, None)
    return found


def _qwen_window(settings: dict[str, Any], where: str) -> int | None:
    """One window for all layers, or none: Qwen may name a kind of attention for each layer."""
    window = settings.get("sliding_window") if settings.get("use_sliding_window") else None
    if window is None:
        return None
    first, layers = settings.get("max_window_layers", 28), settings["num_hidden_layers"]
    kinds = settings.get("layer_types") or ["full_attention"] * first + ["sliding_attention"] * (layers - first)
    kinds = kinds[:layers]
    if len(set(kinds)) > 1:
        raise UserError(f"{where}: layers of both full and sliding attention are not supported: one kind for all is")
    return window if kinds[0] == "sliding_attention" else None


def _rope_fields(settings: dict[str, Any], where: str) -> dict[str, Any]:
    rope = (settings.get("rope_parameters") or {}) | (settings.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default")).replace("default", "")
    if kind not in _ROPE:
        raise UserError(f"{where}: rope type {kind!r} is none of default, {', '.join(filter(None, _ROPE))}")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(f"{where}: partial_rotary_factor={rope['partial_rotary_factor']} is not supported: only 1.0 is")
    found = {"theta": float(rope.get("rope_theta", settings.get("rope_theta", 10000.0))), "rope_scaling_type": kind}
    if kind in ("llama3", "yarn"):
        rope.setdefault("original_max_position_embeddings", settings.get("max_position_embeddings"))
    if kind == "yarn" and rope.get("attention_factor") is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        rope["attention_factor"] = yarn_scale(rope["factor"], rope["mscale"]) / yarn_scale(
            rope["factor"], rope["mscale_all_dim"]
        )
    if kind and rope.get("factor") is None:
        raise UserError(f"{where}: rope type {kind!r} without a factor")
    return found | {ours: rope[key] for key, ours in _ROPE[kind].items() if rope.get(key) is not None}


def yarn_scale(factor: float, mscale: float = 1.0) -> float:
    """By how much YaRN lengthens cos and sin. Ref: arXiv:2309.00071, section 3.4."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def family_of(architecture: Architecture, wanted: str | None = None) -> tuple[str, Family]:
    """The architecture that these flags describe, or `wanted`, if it can. Raises UserError where none does."""
    features = {"qkv_bias", "qk_norm", "sliding_window"}
    used = {name for name in features if getattr(architecture, name)}

    def fits(family: Family) -> bool:
        has_experts = "num_experts" in family.reads.values()
        return set(family.fixed) <= used <= {*family.fixed, *family.optional} and has_experts == bool(
            architecture.num_experts
        )

    if wanted in FAMILIES and fits(FAMILIES[wanted]):
        return wanted, FAMILIES[wanted]
    for name, family in FAMILIES.items():
        if fits(family):
            return name, family
    raise UserError(f"no Hugging Face architecture has {' and '.join(sorted(used))} together")


def hf_settings(architecture: Architecture, dtype: str, base: dict[str, Any] | None = None) -> dict[str, Any]:
    """A config.json for these flags, readable by both generations of transformers; what else `base` says is kept.

    base: the config.json that the model once came with. dtype: "float32", "bfloat16" or "float16".
    """
    base = dict(base or {})
    name, family = family_of(architecture, (base.get("architectures") or [None])[0])
    for key in ("rope_parameters", "rope_scaling", "layer_types", "transformers_version", "auto_map"):
        base.pop(key, None)
    settings = base | family.writes | {"architectures": [name], "model_type": family.model_type, "hidden_act": "silu"}
    for key, ours in (_READS | family.reads).items():
        value = getattr(architecture, ours)
        if key in ("bos_token_id", "eos_token_id") and key in base:
            continue  # a list of ends, or none at all, says more than our one number
        settings[key] = value
    scaling = {"rope_type": architecture.rope_scaling_type or "default"}
    for key, ours in _ROPE[architecture.rope_scaling_type].items():
        if getattr(architecture, ours) is not None:
            scaling[key] = getattr(architecture, ours)
    if family.model_type.startswith("qwen"):
        window = architecture.sliding_window
        settings |= {"sliding_window": window, "use_sliding_window": window is not None}
        settings["max_window_layers"] = 0 if window else architecture.num_hidden_layers
    settings |= {
        "rope_parameters": {**scaling, "rope_theta": architecture.theta},
        "rope_theta": architecture.theta,
        "rope_scaling": {**scaling, "type": architecture.rope_scaling_type} if architecture.rope_scaling_type else None,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    return settings


def rows_for(family: Family, architecture: Architecture) -> tuple[TensorRow, ...]:
    """The rows of a model's own tensors: a tied one has no lm_head."""
    return tuple(row for row in family.rows if row.ours != "unembed" or not architecture.tie_word_embeddings)
