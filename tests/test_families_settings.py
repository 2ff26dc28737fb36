"""What a config.json means, held to transformers' own configuration classes; what they and we do not know is refused.

The classes are there without torch. Of the settings of both, one at a time is left out, set to null, or changed.
"""

import dataclasses
import json
import math
from typing import Any

import pytest

from ringbpt.config import Architecture, UserError, complete, parse, parse_args
from ringbpt.config.families import _READS, FAMILIES, find_family, hf_settings, llama_fields, yarn_scale
from ringbpt.config.foreign import read_json

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "rms_norm_eps": 1e-4,
    "initializer_range": 0.3, "tie_word_embeddings": True, "bos_token_id": 7, "eos_token_id": 8, "hidden_act": "silu",
    "rope_theta": 12345.0, "attention_dropout": 0.0,
}  # fmt: skip
QWEN = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 0, "attention_dropout": 0.0}
OWN = {
    "llama": {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
    "mistral": {"sliding_window": 24},
    "qwen2": QWEN,
    "qwen3": QWEN | {"attention_bias": False},
    "mixtral": {
        "sliding_window": 24, "num_local_experts": 4, "num_experts_per_tok": 3, "router_aux_loss_coef": 0.5,
        "output_router_logits": False, "router_jitter_noise": 0.0,
    },
}  # fmt: skip
TYPES = {family.model_type: name for name, family in FAMILIES.items()}
ROPES: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0},
    {"type": "linear", "factor": 4},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    {"type": "yarn", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "beta_slow": 2, "truncate": False, "attention_factor": 1.5},
    {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.0},
    {"rope_type": "default", "rope_theta": 777.0},
]


def settings_of(kind: str, **changes: Any) -> dict[str, Any]:
    """A config.json of a family that leaves nothing out, with changes; ... leaves a key out."""
    settings = {"architectures": [TYPES[kind]], "model_type": kind} | SIZES | OWN[kind] | changes
    return {key: value for key, value in settings.items() if value is not ...}


def theirs(settings: dict[str, Any]) -> dict[str, Any] | None:
    """Our flags as transformers' class means them; None where it refuses."""
    from transformers import AutoConfig

    settings = json.loads(json.dumps(settings))
    try:
        config = AutoConfig.for_model(**settings)
        config.standardize_rope_params()
    except Exception:  # it has a class of its own for each kind
        return None
    _, family = find_family(settings, "")
    found = {ours: getattr(config, key, None) for key, ours in (_READS | family.reads).items()}
    found["num_key_value_heads"] = found["num_key_value_heads"] or found["num_attention_heads"]
    found["head_dim"] = found["head_dim"] or found["hidden_size"] // found["num_attention_heads"]
    kinds = set(getattr(config, "layer_types", None) or ())
    found["sliding_window"] = found.get("sliding_window") if kinds != {"full_attention"} else None
    if len(kinds) > 1:
        return None
    rope, scaling = config.rope_parameters, "rope_scaling_"
    kind = "" if rope["rope_type"] == "default" else rope["rope_type"]
    found |= {"theta": rope["rope_theta"], f"{scaling}type": kind, f"{scaling}factor": rope.get("factor", 1.0)}
    if kind == "yarn":
        found |= {f"{scaling}beta_fast": rope.get("beta_fast") or 32, f"{scaling}beta_slow": rope.get("beta_slow") or 1}
        found |= {f"{scaling}truncate": rope.get("truncate", True)}
        scale, ours = rope.get("attention_factor"), None
        if scale is None and rope.get("mscale") and rope.get("mscale_all_dim"):
            ours = yarn_scale(rope["factor"], rope["mscale"]) / yarn_scale(rope["factor"], rope["mscale_all_dim"])
        found[f"{scaling}attention_factor"] = scale if scale is not None else ours
    if kind in ("yarn", "llama3"):
        found[f"{scaling}original_length"] = rope["original_max_position_embeddings"]
    return found


def check_same(settings: dict[str, Any], strict: bool = True) -> None:
    """strict: whether what one of the two refuses, the other must refuse too."""
    want, label = theirs(settings), json.dumps(settings)
    try:
        got = dataclasses.asdict(complete(Architecture(**llama_fields(settings, "config.json"))))
    except UserError as error:
        assert want is None or not strict, f"{error}: {label}"
        assert str(error).startswith("config.json: ") and "\n" not in str(error)
        return
    assert want is not None or not strict, label
    assert want is None or {name: got[name] for name in want} == want, label


@pytest.mark.parametrize("kind", TYPES)
def test_what_is_left_out_means_what_the_family_means(kind):
    settings = settings_of(kind)
    check_same(settings)
    for key in settings.keys() - {"model_type", "architectures"}:
        check_same(settings_of(kind, **{key: ...}))
        check_same(settings_of(kind, **{key: None}), strict=False)
    check_same({"model_type": kind})  # all of them
    for rope in ROPES:
        for place in ("rope_scaling", "rope_parameters"):
            if "rope_theta" not in rope:
                check_same(settings_of(kind, **{place: rope}))
            for key in rope:  # without its type, what is said of a type is ignored by them and refused by us
                less = {name: value for name, value in rope.items() if name != key}
                check_same(settings_of(kind, rope_theta=..., **{place: less}), strict="type" not in key)
    check_same(settings_of(kind, rope_scaling=ROPES[4], original_max_position_embeddings=64))
    check_same(settings_of(kind, rope_scaling=None, rope_parameters=None))
    check_same(settings_of(kind, rope_scaling={}, rope_theta=...))


@pytest.mark.parametrize("kind", TYPES)
def test_what_transformers_writes_is_known(kind):
    """Every key that its class has, as save_pretrained writes it and in full; and our own config.json."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind)
    for written in (config.to_dict(), config.to_diff_dict()):
        check_same(json.loads(json.dumps(written)))
    for window in (None, 24) if kind != "llama" else (None,):
        changes: dict[str, Any] = {"sliding_window": window} | ({"use_sliding_window": True} if window else {})
        changes = {key: value for key, value in changes.items() if kind.startswith("qwen") or key == "sliding_window"}
        before = complete(Architecture(**llama_fields(settings_of(kind, rope_scaling=ROPES[5], **changes), "")))
        exported = hf_settings(before, "float32")
        assert complete(Architecture(**llama_fields(exported, ""))) == before
        check_same(exported)


TWO_KINDS = ["full_attention", "sliding_attention", "full_attention"]
REFUSED: dict[str, dict[str, Any]] = {
    # R26 and its like: a kind of attention, or a window, for each layer.
    "layers of both full and sliding attention": {"kind": "mistral", "layer_types": TWO_KINDS},
    "are not supported: one kind for all is": {"layer_types": TWO_KINDS},
    "layer_types='sliding_attention' in every layer contradicts": {"layer_types": ["sliding_attention"] * 3},
    "layer_types='chunked_attention'": {"layer_types": ["chunked_attention"] * 3},
    "does not name the kinds of 3 layers": {"layer_types": ["full_attention"] * 2},
    "layer_types='full' does not name": {"layer_types": "full"},
    "no_rope_layers=[1, 0, 1]": {"no_rope_layers": [1, 0, 1]},
    "no_rope_layer_interval=4": {"no_rope_layer_interval": 4},
    "per_layer_config": {"per_layer_config": {"1": {"num_attention_heads": 4}}},
    "mlp_layer_types": {"mlp_layer_types": ["dense", "sparse", "dense"]},
    "sliding_window=24 is no setting of a llama": {"sliding_window": 24},
    "num_local_experts=4 is no setting": {"num_local_experts": 4},
    # What other models multiply and cap.
    "attn_logit_softcapping=30.0": {"attn_logit_softcapping": 30.0},
    "logit_scale=0.5": {"logit_scale": 0.5},
    "something_new=True": {"something_new": True},
    "router_jitter_noise=0.1": {"kind": "mixtral", "router_jitter_noise": 0.1},
    "hidden_act=None": {"hidden_act": None},
    "activation='relu'": {"activation": "relu"},
    # R27: rotary positions.
    "rope type None": {"rope_scaling": {"rope_type": None}},
    "rope type 'mrope'": {"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}},
    "mrope_section=[1, 2]": {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2]}},
    "rope type ['yarn']": {"rope_scaling": {"rope_type": ["yarn"]}},
    "full_attention={'rope_type'": {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
    "rope_scaling='linear' is no object": {"rope_scaling": "linear"},
    "rope_parameters=[1] is no object": {"rope_parameters": [1]},
    "factor='4' is not a number": {"rope_scaling": {"type": "linear", "factor": "4"}},
    "factor=True is not a number": {"rope_scaling": {"type": "linear", "factor": True}},
    "factor=nan is not a number": {"rope_scaling": {"type": "linear", "factor": math.nan}},
    "factor=-1.0 is not above 0": {"rope_scaling": {"type": "linear", "factor": -1.0}},
    "without a factor": {"rope_scaling": {"type": "yarn", "factor": None}},
    "without a low_freq_factor": {"rope_scaling": {"type": "llama3", "factor": 8.0, "high_freq_factor": 4.0}},
    "is not below high_freq_factor": {"rope_scaling": ROPES[2] | {"low_freq_factor": 4.0}},
    "truncate=None is not True or False": {"rope_scaling": ROPES[3] | {"truncate": None}},
    "original_max_position_embeddings=None": {"rope_scaling": ROPES[3] | {"original_max_position_embeddings": None}},
    "mscale='a' with mscale_all_dim=1.0": {"rope_scaling": ROPES[6] | {"mscale": "a"}},
    "rope_theta='1e4' is not a number": {"rope_theta": "1e4"},
    "partial_rotary_factor=0.5": {"partial_rotary_factor": 0.5},
    "beta_fast=3 is no setting of rope type 'linear'": {"rope_scaling": {**ROPES[0], "beta_fast": 3}},
    # Two places that say two things.
    "rope_theta is 12345.0 in one place": {"rope_parameters": {"rope_theta": 5.0}},
    "rope_type is 'default' in one place": {"rope_scaling": ROPES[0], "rope_parameters": {"rope_type": "default"}},
    "rope_type is 'yarn' in one place": {"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}},
    "beta_fast is 3 in one place": {"rope_scaling": ROPES[4], "rope_parameters": ROPES[4] | {"beta_fast": 3}},
    "LlamaForCausalLM contradicts model_type='mistral'": {"model_type": "mistral"},
    # What no number can be.
    "vocab_size=[96] is not a whole number": {"vocab_size": [96]},
    "hidden_size=True is not a whole number": {"hidden_size": True},
    "hidden_size=64.0 is not a whole number": {"hidden_size": 64.0},
    "num_hidden_layers=0 is below 1": {"num_hidden_layers": 0},
    "rms_norm_eps='1e-5' is not a number": {"rms_norm_eps": "1e-5"},
    "tie_word_embeddings=1 is not True or False": {"tie_word_embeddings": 1},
    "tie_word_embeddings=None is not True or False": {"tie_word_embeddings": None},
    "use_sliding_window='yes' is not True or False": {"kind": "qwen2", "use_sliding_window": "yes"},
    "head_dim=None, and qwen3": {"kind": "qwen3", "head_dim": None},
    "architecture [1] is none of": {"architectures": [[1]]},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_known_is_refused_by_name(message):
    changes = dict(REFUSED[message])
    settings = settings_of(changes.pop("kind", "llama"), **changes)
    with pytest.raises(UserError) as caught:
        llama_fields(settings, "config.json")
    assert str(caught.value).startswith("config.json: ") and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_models_on_the_hub_say_besides_is_let_be():
    """What is switched off, and what touches no maths: SmolLM2, Falcon 3, LLaMA 2, Vicuna and fine-tuned models."""
    besides = {
        "is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"},
        "use_mrope": False, "activation": "swiglu", "pretraining_tp": 2, "max_sequence_length": 2048,
        "temperature": 0.9, "use_cache": False, "_name_or_path": "x", "unsloth_version": "1", "pad_token_id": 0,
        "tokenizer_class": "LlamaTokenizer", "rope_scaling": None, "quantization_config": None, "sliding_window": None,
        "hidden_dropout": 0.0,
    }  # fmt: skip
    assert llama_fields(settings_of("llama", **besides), "") == llama_fields(settings_of("llama"), "")


def test_windows_of_layers_that_are_alike():
    def window(kind: str, **changes: Any) -> int | None:
        return llama_fields(settings_of(kind, **changes), "")["sliding_window"]

    full, sliding = ["full_attention"] * 3, ["sliding_attention"] * 3
    assert window("mistral", layer_types=sliding) == window("qwen2", layer_types=sliding) == 24
    assert window("llama", layer_types=full) is window("mistral", layer_types=full, sliding_window=None) is None
    assert window("qwen3", layer_types=full) is window("qwen3", max_window_layers=3) is None
    assert window("qwen3", sliding_window=...) == window("mistral", sliding_window=...) == 4096
    assert window("qwen2", max_window_layers=...) is None  # 28: more than there are layers


def test_a_key_that_stands_twice_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"rope_theta": 1.0, "a": {"rope_theta": 3}, "rope_theta": 2.0}')
    with pytest.raises(UserError, match=r"config\.json: rope_theta stands there twice"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("by", ["flags", "update"])
@pytest.mark.parametrize(("rope", "length"), [("yarn", None), ("llama3", None), ("yarn", 256)])
def test_yarn_by_flags_takes_the_length_of_the_checkpoint(by, rope, length, tmp_path):
    """R21: the original length is the checkpoint's, as for a config.json that leaves it out."""
    (tmp_path / "config.json").write_text(json.dumps(settings_of("llama")))
    given = {"rope_scaling_type": rope, "rope_scaling_factor": 4.0, "max_sequence_length": 2048}
    given |= {"rope_scaling_original_length": length} if length else {}
    flags = [f"--llama.{name}={value}" for name, value in given.items()]
    if by == "update":
        flags = [f"--update_llama_config=dict({', '.join(f'{name}={value!r}' for name, value in given.items())})"]
    spec = [f"--load_checkpoint=huggingface::{tmp_path}", "--mesh_dim=1,1,1,1", "--tokenizer.vocab_file=bytes"]
    llama = parse(parse_args([*spec, "--train_dataset.type=python", *flags]), 1).architecture
    assert (llama.rope_scaling_original_length, llama.rope_scaling_type) == (length or 512, rope)
    assert hf_settings(llama, "float32")["rope_parameters"]["original_max_position_embeddings"] == (length or 512)


def test_yarn_by_flags_on_other_checkpoints_needs_their_length():
    spec, yarn = "--load_checkpoint=params::runs/x", "--llama.rope_scaling_type=yarn"
    length = "rope_scaling_original_length"
    for flags in ([yarn], ["--update_llama_config=dict(rope_scaling_type='yarn')"]):
        with pytest.raises(UserError, match=f"--llama.{length}=4096, or whatever"):
            parse_args([spec, *flags])
    assert parse_args([spec, yarn, f"--llama.{length}=512"]).llama[length] == 512
    assert parse_args([yarn]).llama[length] == 8192  # from nothing
    assert parse_args([spec, "--llama.rope_scaling_type=linear"]).llama.rope_scaling_type == "linear"


def test_nothing_of_a_recipe_shines_through(tmp_path):
    """A folder's config.json says the whole model, whatever a recipe had set."""
    (tmp_path / "config.json").write_text(json.dumps(settings_of("llama")))
    (tmp_path / "recipe.py").write_text(
        "from ringbpt.config import default_config\n\n\ndef get_config():\n    tree = default_config()\n"
        "    tree.llama.update(qkv_bias=True, num_experts=4, rope_scaling_beta_fast=3.0, sliding_window=5)\n"
        "    return tree\n"
    )
    tree = parse_args([f"--config={tmp_path}/recipe.py", f"--load_checkpoint=huggingface::{tmp_path}"])
    expected = Architecture(**llama_fields(settings_of("llama"), ""))
    assert {name: tree.llama[name] for name in dataclasses.asdict(expected) if name != "max_sequence_length"} == {
        name: value for name, value in dataclasses.asdict(expected).items() if name != "max_sequence_length"
    }
