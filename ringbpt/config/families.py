"""The families of Hugging Face models, as data: what their config.json means in our flags, and the table of tensors.

One table serves both ways: a row names our param, their tensor ({L} the layer, {E} the expert) and the pattern from
theirs to ours, whose sides are swapped to go back. It stands at the bottom of the house, and imports no jax, because
the command line reads a model's sizes from its config.json before anything else happens.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from ringbpt.config.aliases import without_effect
from ringbpt.config.fields import RUN_FLAGS, Architecture
from ringbpt.config.foreign import is_finite, is_of, read_field, shown
from ringbpt.config.values import KINDS, UserError


class TensorRow(NamedTuple):
    ours: str
    theirs: str
    pattern: str


EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"  # which may be tied: one weight for both
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
    TensorRow("embed", EMBED, "V D -> V D"),
    TensorRow("norm", "model.norm.weight", "D -> D"),
    TensorRow("unembed", HEAD, "V D -> D V"),
)
SCORE = TensorRow("score", "score.weight", "1 D -> D")  # of a reward model, which has no HEAD
IGNORED = ".rotary_emb.inv_freq"  # tensors of a file that are no weights: they follow from its config.json


@dataclass(frozen=True)
class Family:
    """One architecture. fixed: flags that it sets by its mere name; reads: its own keys of config.json -> our flags;
    optional: flags that a model of it may use beyond LLaMA's; writes: keys that transformers wants to see besides;
    defaults: what keys mean that its config.json leaves out, where that isn't what they mean in LLaMA's."""

    model_type: str
    rows: tuple[TensorRow, ...]
    fixed: dict[str, Any] = field(default_factory=dict)
    reads: dict[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    writes: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)


_NO_BIAS = {"attention_bias": False}
_MISTRAL = {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}
_QWEN = {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768,
    "bos_token_id": None, "eos_token_id": None, "sliding_window": 4096,
}  # fmt: skip
FAMILIES: dict[str, Family] = {
    # LLaMA 1, 2, 3, 3.1, 3.2, CodeLlama, and whoever else has the same architecture.
    "LlamaForCausalLM": Family("llama", _ENDS + _ATTENTION + _FEEDFORWARD, writes=_NO_BIAS | {"mlp_bias": False}),
    "MistralForCausalLM": Family(
        "mistral", _ENDS + _ATTENTION + _FEEDFORWARD, reads={"sliding_window": "sliding_window"},
        optional=("sliding_window",), defaults=_MISTRAL | {"sliding_window": 4096},
    ),
    "Qwen2ForCausalLM": Family(
        "qwen2", _ENDS + _ATTENTION + _BIASES + _FEEDFORWARD, {"qkv_bias": True},
        reads={"sliding_window": "sliding_window"}, optional=("sliding_window",), defaults=_QWEN,
    ),
    "Qwen3ForCausalLM": Family(
        "qwen3", _ENDS + _ATTENTION + _QK_NORMS + _FEEDFORWARD, {"qk_norm": True},
        reads={"sliding_window": "sliding_window"}, optional=("sliding_window",), writes=_NO_BIAS,
        defaults=_QWEN | {"head_dim": 128},
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
        defaults=_MISTRAL | {"rms_norm_eps": 1e-5, "rope_theta": 1e6},
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
# What a key means that a config.json leaves out: the defaults of transformers' configuration classes, LlamaConfig's
# unless the family has its own. A test holds them to the classes.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "initializer_range": 0.02, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    "rope_theta": 10000.0, "sliding_window": None,
    "num_local_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.001,
}  # fmt: skip
# What a config.json may say that our model does not do, and the only value that it does.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "activation": ("swiglu", None),  # Falcon 3 says so beside hidden_act
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "attention_dropout": (0.0, None),
    "router_jitter_noise": (0.0, None),
    "quantization_config": (None,),
}
# Keys that do not touch what a model of these families computes, in transformers' code of them. Whatever else we do not
# read is refused, unless it is switched off: nobody can tell what it means.
_NO_MATHS = frozenset(
    """
    architectures model_type transformers_version dtype torch_dtype name_or_path tokenizer_class pad_token_id
    sep_token_id unk_token_id use_cache pretraining_tp output_router_logits chunk_size_feed_forward return_dict
    output_hidden_states output_attentions id2label label2id num_labels problem_type finetuning_task prefix
    task_specific_params attn_implementation model_max_length max_sequence_length gradient_checkpointing
    use_flash_attention_2 is_llama_config torchscript
    bad_words_ids begin_suppress_tokens decoder_start_token_id diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff exponential_decay_length_penalty
    forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens min_length min_p
    no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
    num_return_sequences output_scores remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens
    temperature top_k top_p typical_p
    """.split()  # noqa: SIM905  (a list would be a page long)
)
_NO_MATHS_PREFIXES = ("_", "unsloth_", "transformers.", "assistant_", "target_")
# Which layers of Qwen's have the window, and what is meant where that is left out.
_QWEN_WINDOW: dict[str, Any] = {"use_sliding_window": False, "max_window_layers": 28}
_LABELS = ("num_labels", "id2label", "label2id", "problem_type")
_SCORES = ("ForSequenceClassification", "ForCausalLM")  # the ends of architectures' names: of a reward model, and else
_OURS_ALONE = "param_scan_axis"  # no config.json says anything of it
# Where rotary positions are said, and what of them may stand on its own.
_ROPE_PLACES = ("rope_scaling", "rope_parameters")
_ROPE_BESIDE = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
_ROPE_NEEDED = ("factor", "low_freq_factor", "high_freq_factor")
_ROPE_MAY_BE_NULL = ("attention_factor", "beta_fast", "beta_slow")  # and mean then what they mean left out
_MSCALES = ("mscale", "mscale_all_dim")  # yarn's attention_factor, in other words
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


def find_family(settings: dict[str, Any], where: str) -> tuple[str, Family]:
    """(architecture, Family) of a config.json. Raises UserError for code of its own, for another architecture, and
    where its model_type is another's."""
    if "auto_map" in settings:
        raise UserError(f"{where}: auto_map: this model needs code of its author's, which is never run here")
    names, kind = settings.get("architectures") or [], settings.get("model_type")
    name = names[0] if isinstance(names, list) and names else None
    name = name.replace(*_SCORES) if isinstance(name, str) else name
    if name is None:  # a bare config without weights, or one written by hand
        name = next((name for name, family in FAMILIES.items() if family.model_type == kind), kind)
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"{where}: architecture {name!r} is none of {', '.join(FAMILIES)}, nor of those a {_SCORES[0]}")
    if kind not in (None, FAMILIES[name].model_type):
        raise UserError(f"{where}: architecture {name} contradicts model_type={shown(kind)}: leave one of them out")
    return name, FAMILIES[name]


def llama_fields(settings: dict[str, Any], where: str) -> dict[str, Any]:
    """config.json, of either generation, -> every flag below `llama.` that describes the model.

    A key that is left out means what it means in the family's own configuration class. Raises UserError, with `where`
    as the culprit, for what our model does not do and for settings that are not known.
    """
    _, family = find_family(settings, where)
    _check_keys(settings, family, where)
    defaults = _DEFAULTS | family.defaults
    found = {item.name: item.default for item in fields(Architecture) if item.name != _OURS_ALONE}
    found = {name: value for name, value in found.items() if not without_effect(f"llama.{name}")}
    for key, ours in (_READS | family.reads).items():
        value = settings.get(key, defaults[key])
        if key.endswith("_token_id") and isinstance(value, list):
            value = value[0] if value else None  # several ends: the first; generation reads them all
        if key == "head_dim" and value is None and defaults[key]:
            raise UserError(f"{where}: head_dim=None, and {family.model_type} models have one of their own: name it")
        found[ours] = read_field(value, RUN_FLAGS[f"llama.{ours}"], f"{where}: {key}")
    found |= family.fixed | _rope_fields(settings, where, defaults)
    found["sliding_window"] = _window(settings, found, family, where)
    if is_scoring(settings):
        named = settings.get("id2label")
        labels = settings.get("num_labels", len(named) if isinstance(named, dict) else 2)  # 2: transformers' default
        if labels != 1:
            raise UserError(
                f"{where}: num_labels={shown(labels)}: a reward model has one, and others are not supported"
            )
        found["head"] = "score"
    return found


def is_scoring(settings: dict[str, Any]) -> bool:
    """Whether a config.json is of a model that gives a text a number."""
    names = settings.get("architectures")
    return isinstance(names, list) and bool(names) and str(names[0]).endswith(_SCORES[0])


def _check_keys(settings: dict[str, Any], family: Family, where: str) -> None:
    """Raises UserError for the first setting that our model does not do, or that is none of the family's."""
    for key, allowed in _ONLY.items():
        if settings.get(key, allowed[0]) not in allowed:
            raise UserError(f"{where}: {key}={shown(settings[key])} is not supported: only {allowed[0]!r} is")
    known = {*_READS, *family.reads, *_ONLY, *_ROPE_PLACES, *_ROPE_BESIDE, *_NO_MATHS, "layer_types"}
    known |= _QWEN_WINDOW.keys() if family.model_type.startswith("qwen") else set()
    for key, value in settings.items():
        if value and key not in known and not key.startswith(_NO_MATHS_PREFIXES):
            raise UserError(
                f"{where}: {key}={shown(value)} is no setting of a {family.model_type} model that is known here, and "
                "may change what it computes: remove it if it doesn't"
            )


def _window(settings: dict[str, Any], found: dict[str, Any], family: Family, where: str) -> int | None:
    """One window for all layers, or none: a config.json may name a kind of attention for each layer."""
    kinds, window, layers = settings.get("layer_types"), found["sliding_window"], found["num_hidden_layers"]
    if family.model_type.startswith("qwen"):
        given = {key: settings.get(key, default) for key, default in _QWEN_WINDOW.items()}
        for key, value in given.items():
            if not is_of(type(_QWEN_WINDOW[key]), value):
                raise UserError(f"{where}: {key}={shown(value)} is not {KINDS[type(_QWEN_WINDOW[key])]}")
        if not given["use_sliding_window"]:
            window = None
        if kinds is None and window is not None:
            full = min(max(given["max_window_layers"], 0), layers)
            kinds = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
        if isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds):
            window = None
    if kinds is None:
        return window
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise UserError(f"{where}: layer_types={shown(kinds)} does not name the kinds of {layers} layers")
    if any(kind != kinds[0] for kind in kinds):
        raise UserError(f"{where}: layers of both full and sliding attention are not supported: one kind for all is")
    if kinds[0] != ("full_attention" if window is None else "sliding_attention"):
        raise UserError(f"{where}: layer_types={shown(kinds[0])} in every layer contradicts sliding_window={window}")
    return window


def _rope_fields(settings: dict[str, Any], where: str, defaults: dict[str, Any]) -> dict[str, Any]:
    rope = _rope_settings(settings, where, defaults["rope_theta"])
    kind = rope.pop("rope_type", "default")
    if kind not in ("default", *filter(None, _ROPE)):
        raise UserError(f"{where}: rope type {kind!r} is none of default, {', '.join(filter(None, _ROPE))}")
    reads = _ROPE["" if kind == "default" else kind]
    if (share := rope.pop("partial_rotary_factor", None)) not in (None, 1.0):
        raise UserError(f"{where}: partial_rotary_factor={shown(share)} is not supported: only 1.0 is")
    for key, value in rope.items():
        if value is not None and key not in (*_ROPE_BESIDE, *reads, *(_MSCALES if kind == "yarn" else ())):
            raise UserError(f"{where}: {key}={shown(value)} is no setting of rope type {kind!r} that is known here")
    for key in _ROPE_NEEDED:
        if key in reads and rope.get(key) is None:
            raise UserError(f"{where}: rope type {kind!r} without a {key}")
    length = settings.get("max_position_embeddings", defaults["max_position_embeddings"])
    rope.setdefault("original_max_position_embeddings", length)
    rope = {key: value for key, value in rope.items() if value is not None or key not in _ROPE_MAY_BE_NULL}
    # The length whatever the type: where flags ask for another type, it is the checkpoint's that they stretch.
    reads = reads | {"rope_theta": "theta", "original_max_position_embeddings": "rope_scaling_original_length"}
    found = {
        ours: read_field(rope[key], RUN_FLAGS[f"llama.{ours}"], f"{where}: {key}")
        for key, ours in reads.items()
        if key in rope
    }
    scales = [rope[key] for key in _MSCALES if rope.get(key)]
    if len(scales) == len(_MSCALES) and "attention_factor" not in rope:
        if not all(is_of(float, scale) and is_finite(scale) and scale > 0 for scale in scales):
            raise UserError(f"{where}: mscale={scales[0]!r} with mscale_all_dim={scales[1]!r}: not two numbers above 0")
        own, all_dim = (yarn_scale(found["rope_scaling_factor"], scale) for scale in scales)
        found["rope_scaling_attention_factor"] = own / all_dim
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise UserError(f"{where}: low_freq_factor={rope['low_freq_factor']} is not below high_freq_factor")
    return found | {"rope_scaling_type": "" if kind == "default" else kind}


def _rope_settings(settings: dict[str, Any], where: str, theta: float) -> dict[str, Any]:
    """rope_scaling, else rope_parameters, and what stands beside them, as one; "type" is the old name of rope_type.

    theta: where the settings have none. Raises UserError where two places say different things.
    """
    scaling, parameters = (settings.get(place) or {} for place in _ROPE_PLACES)
    for place, said in zip(_ROPE_PLACES, (scaling, parameters), strict=True):
        if not isinstance(said, dict):
            raise UserError(f"{where}: {place}={shown(said)} is no object")
    beside = {key: settings[key] for key in _ROPE_BESIDE if key in settings}
    if "rope_theta" not in (scaling or parameters):
        beside.setdefault("rope_theta", theta)
    found: dict[str, Any] = {}
    for said in (scaling, parameters, beside):
        for key, value in said.items():
            key = "rope_type" if key == "type" else key
            ignored = said is parameters and scaling and key not in (*found, "rope_theta")
            if ignored or found.setdefault(key, value) not in (value,):  # what is not a number is not itself
                other = "nothing" if ignored else shown(found[key])
                raise UserError(f"{where}: {key} is {shown(value)} in one place and {other} in another: leave one out")
    return found


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
    names = base.get("architectures")
    wanted = names[0].replace(*_SCORES) if isinstance(names, list) and names and isinstance(names[0], str) else None
    name, family = family_of(architecture, wanted)
    if base.get("model_type", family.model_type) != family.model_type:
        base = {}  # another family's settings would mean something else
    for key in ("layer_types", "transformers_version", "auto_map", *_LABELS, *_ROPE_PLACES, *_ROPE_BESIDE):
        base.pop(key, None)
    if architecture.head == "score":
        name = name.replace(*_SCORES[::-1])
        base |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}  # num_labels follows
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
    """The rows of a model's own tensors: a tied one has no lm_head, a reward model a score in its place."""
    headless = architecture.tie_word_embeddings or architecture.head == "score"
    rows = tuple(row for row in family.rows if row.theirs != HEAD or not headless)
    return (*rows, SCORE) if architecture.head == "score" else rows
