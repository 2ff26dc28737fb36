"""The command line: what is accepted means what users expect, and what is refused says what would work."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys

import pytest

from ringbpt.config import (
    ENTRY_FLAGS,
    PRESETS,
    ROOT,
    RUN_FLAGS,
    SECTIONS,
    Config,
    Flag,
    UserError,
    default_config,
    format_config,
    help_text,
    parse,
    parse_args,
    printed_help,
    read_flags,
    read_literals,
    run_main,
    split_flags,
    to_dict,
    without_effect,
)

DEBUG = "--config=tests/recipe.py"
SEQ = "--train_dataset.python_dataset.seq_length"
EVAL_SEQ = "--eval_dataset.python_dataset.seq_length"


def configured(*argv: str, devices: int = 8) -> Config:
    return parse(parse_args(list(argv)), devices)


def refusal(*argv: str, devices: int = 8) -> str:
    """The one line that a command line is refused with."""
    with pytest.raises(UserError) as caught:
        configured(*argv, devices=devices)
    assert caught.value.code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the commands that users already have ---

ORIGINAL = """
  --mesh_dim='{mesh}' --dtype='bf16' --total_steps={steps} --log_freq=200 --save_model_freq=0 --save_milestone_freq=1000
  --load_llama_config='{model}'
  --update_llama_config="dict(max_sequence_length={length},scan_attention=True,scan_query_chunk_size=2048,scan_key_chunk_size=4096,remat_attention='nothing_saveable',scan_mlp=True,scan_mlp_chunk_size=2048,remat_mlp='nothing_saveable',remat_block='nothing_saveable',scan_layers=True,attention_type='{attention}',param_scan_axis=0,mesh_dim='{mesh}')"
  --load_dataset_state='' --load_checkpoint='' --tokenizer.vocab_file="<tokenizer.model>"
  --optimizer.type='adamw' --optimizer.adamw_optimizer.weight_decay=0.1 --optimizer.adamw_optimizer.lr=1.5e-4 --optimizer.adamw_optimizer.end_lr=1.5e-5 --optimizer.adamw_optimizer.lr_warmup_steps=2000 --optimizer.adamw_optimizer.lr_decay_steps=480000
  --train_dataset.type='json' --train_dataset.text_processor.fields='text' --train_dataset.json_dataset.path="<data.jsonl>" --train_dataset.json_dataset.seq_length={length} --train_dataset.json_dataset.batch_size={batch} --train_dataset.json_dataset.tokenizer_processes=16
  --checkpointer.save_optimizer_state=True
"""  # noqa: E501
BPT = {"mesh": "1,64,4,1", "model": "13b", "attention": "blockwise", "length": 32768, "batch": 64, "steps": 480000}
RING = {
    "mesh": "1,1,4,64",
    "model": "7b",
    "attention": "ring_blockwise",
    "length": 2097152,
    "batch": 1,
    "steps": 480000,
}


@pytest.mark.parametrize(
    ("values", "devices"),
    [
        (BPT, 256),
        (RING, 256),
        (BPT | {"mesh": "1,2,4,1", "model": "debug", "steps": 3, "length": 64, "batch": 4}, 8),
        (RING | {"mesh": "1,1,2,4", "model": "debug", "steps": 3, "length": 64, "batch": 2}, 8),
    ],
)
def test_original_commands(values, devices):
    config = configured(*shlex.split(ORIGINAL.format(**values)), devices=devices)
    assert ",".join(map(str, config.mesh_shape)) == values["mesh"]
    assert config.architecture.hidden_size == PRESETS[values["model"]]["hidden_size"]
    assert config.execution.attention_type == values["attention"]
    assert config.architecture.max_sequence_length == config.train_dataset.seq_length == values["length"]
    assert config.execution.remat_attention == "nothing_saveable"
    assert config.execution.scan_attention is True
    assert config.train_dataset.json_dataset.path == "<data.jsonl>"
    assert config.train_dataset.batch_size == values["batch"]
    assert config.optimizer.adamw_optimizer.lr == 1.5e-4
    assert config.checkpointer.save_optimizer_state is True
    assert config.execution.sequence_layout == ("zigzag" if config.mesh_shape[3] > 1 else "contiguous")


def test_original_defaults():
    tree = default_config()
    assert (tree.seed, tree.mesh_dim, tree.dtype, tree.total_steps, tree.log_freq) == (
        42,
        "1,-1,1,1",
        "bf16",
        10000,
        50,
    )
    assert (tree.llama.hidden_size, tree.llama.theta, tree.optimizer.adamw_optimizer.b2) == (4096, 10000.0, 0.95)
    assert "mesh_shape" not in tree
    with pytest.raises(AttributeError):
        tree.sede = 1


# --- what is applied when ---


@pytest.mark.parametrize(
    "line",
    [
        "", "--print_config", "--seed=1", "--mesh_dim=1,1,1,8 --num_cpu_devices=8 --total_steps=3", "--autoresume",
        "--ring_attn_size=8", "--optimizer.type=lion", "--learning_rate=1e-3", "--llama.scan_mlp=False",
        "--load_checkpoint= --load_dataset_state=", "--logger.output_dir=elsewhere",
    ],
)  # fmt: skip
def test_flags_that_say_nothing_of_what_is_trained_start_from_the_debug_recipe(line):
    assert parse_args(line.split()).tokenizer.vocab_file == "bytes"
    assert configured(*(word for word in line.split() if word != "--print_config")).mesh_shape == (1, 1, 1, 8)


@pytest.mark.parametrize(
    "line",
    [
        "--load_llama_config=debug", "--llama.num_hidden_layers=2", "--load_checkpoint=params::x",
        "--update_llama_config=dict(scan_mlp=True)", "--train_dataset.type=python", "--tokenizer.vocab_file=t.model",
        "--eval_dataset.json_dataset.path=x", "--cutoff_len=64", "--dataset=a.jsonl", "--sample_packing", "--config=",
    ],
)  # fmt: skip
def test_flags_that_say_what_is_trained_start_from_the_defaults(line):
    tree = parse_args(["--mesh_dim=1,1,1,8", line])
    assert (tree.dtype, tree.num_cpu_devices) == ("bf16", 0) and tree.tokenizer.vocab_file != "bytes"


@pytest.mark.parametrize(
    ("mesh_dim", "devices"), [("1,1,1,4", 4), ("!dp:1,fsdp:2,tp:1,sp:1", 2), ("1,-1,1,2", 8), ("1,1,4,64", 256)]
)
def test_a_mesh_says_how_many_virtual_devices_a_recipe_wants(mesh_dim, devices):
    for recipe in ([], ["--config=configs/debug.py"]):
        assert parse_args([*recipe, f"--mesh_dim={mesh_dim}"]).num_cpu_devices == devices
        assert parse_args([*recipe, f"--mesh_dim={mesh_dim}", "--num_cpu_devices=3"]).num_cpu_devices == 3
    assert parse_args([f"--mesh_dim={mesh_dim}", "--load_llama_config=7b"]).num_cpu_devices == 0


def test_the_mesh_says_which_attention():
    flags = ["--load_llama_config=debug", "--tokenizer.vocab_file=bytes"]
    for mesh_dim, kind in (("1,1,1,8", "ring_blockwise"), ("1,8,1,1", "blockwise"), ("2,1,2,2", "ring_blockwise")):
        assert configured(*flags, f"--mesh_dim={mesh_dim}").execution.attention_type == kind
        given = configured(*flags, f"--mesh_dim={mesh_dim}", "--llama.attention_type=ring_standard")
        assert given.execution.attention_type == "ring_standard"
    assert "keeps a sequence on one device" in refusal(*flags, "--mesh_dim=1,1,1,8", "--llama.attention_type=standard")


# --- the rates that nobody gave ---


def rates(*argv: str) -> tuple:
    """(lr, end_lr, lr_warmup_steps, lr_decay_steps) of AdamW."""
    group = configured("--load_llama_config=debug", *argv).optimizer.adamw_optimizer
    return group.lr, group.end_lr, group.lr_warmup_steps, group.lr_decay_steps


FINE, NEW = (2e-5, 2e-6, 30, 1000), (3e-4, 3e-5, 100, 1000)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("--total_steps=1000", NEW),
        ("--total_steps=1000 --load_checkpoint=params::runs/x", FINE),
        ("--total_steps=1000 --load_checkpoint=trainstate_params::runs/x", FINE),
        ("--total_steps=1000 --load_checkpoint=flax_params::x --autoresume", FINE),
        ("--total_steps=1000 --load_checkpoint=trainstate::runs/x", NEW),
        ("--total_steps=1000 --autoresume", NEW),
        ("--total_steps=400000", (3e-4, 3e-5, 2000, 400000)),
        ("--total_steps=3", (3e-4, 3e-5, 0, 3)),
        # A value that is given stays, and the others make room for it.
        ("--learning_rate=1e-3 --total_steps=1000", (1e-3, 1e-4, 100, 1000)),
        ("--learning_rate=0 --total_steps=1000 --load_checkpoint=params::x", (0.0, 0.0, 30, 1000)),
        ("--optimizer.adamw_optimizer.end_lr=0 --load_checkpoint=params::x --total_steps=1000", (2e-5, 0, 30, 1000)),
        ("--optimizer.adamw_optimizer.lr_warmup_steps=2000 --total_steps=10", (3e-4, 3e-5, 2000, 2001)),
        ("--optimizer.adamw_optimizer.lr_decay_steps=50 --total_steps=1000", (3e-4, 3e-5, 49, 50)),
    ],
)
def test_rates_that_nobody_gave(line, wanted):
    assert rates(*line.split()) == wanted


def test_rates_of_the_other_optimizers():
    for load, lion, muon, palm in (("", 1e-4, (0.02, 3e-4), 0.01), ("params::x", 5e-6, (1e-3, 2e-5), 1e-3)):
        optimizer = configured("--load_llama_config=debug", f"--load_checkpoint={load}").optimizer
        assert optimizer.lion_optimizer.lr == lion and optimizer.palm_optimizer.lr == palm
        assert (optimizer.muon_optimizer.lr, optimizer.muon_optimizer.adam_lr) == muon
        assert optimizer.lion_optimizer.end_lr == pytest.approx(lion / 10)


def test_a_decay_that_rises_is_refused_unless_it_is_asked_for():
    flags = [DEBUG, "--optimizer.adamw_optimizer.lr=1e-5", "--optimizer.adamw_optimizer.end_lr=1e-4"]
    message = refusal(*flags)
    assert "--optimizer.adamw_optimizer.end_lr=0.0001 is above --optimizer.adamw_optimizer.lr=1e-05" in message
    assert "--optimizer.adamw_optimizer.end_lr=1e-06, or --optimizer.allow_rising_lr" in message
    assert configured(*flags, "--optimizer.allow_rising_lr").optimizer.adamw_optimizer.end_lr == 1e-4
    level = configured(*flags[:2], "--optimizer.adamw_optimizer.end_lr=1e-5").optimizer.adamw_optimizer
    assert level.end_lr == level.lr


def test_learning_rate_is_lr_of_the_chosen_optimizer():
    assert parse_args(["--learning_rate=1e-3"]).optimizer.adamw_optimizer.lr == 1e-3
    muon = parse_args(["--learning_rate=1e-3", "--optimizer.type=muon"]).optimizer
    assert (muon.muon_optimizer.lr, muon.adamw_optimizer.lr) == (1e-3, 4e-3)
    assert "leave one of them out" in refusal("--learning_rate=1e-3", "--optimizer.adamw_optimizer.lr=1e-4")
    for name, lr in (("", "adamw_"), ("muon_optimizer.", "muon_"), ("adam.", "adamw_")):
        assert f"did you mean --optimizer.{lr}optimizer.lr?" in refusal(f"--optimizer.{name}learning_rate=1")


def test_order_of_recipe_preset_flags_and_update():
    argv = [
        "--update_llama_config=dict(num_hidden_layers=5, head_dim=64)",
        "--llama.num_hidden_layers=4",
        "--llama.intermediate_size=512",
        "--load_llama_config=200m",
        DEBUG,
    ]
    architecture = configured(*argv).architecture
    assert (architecture.hidden_size, architecture.intermediate_size) == (
        1024,
        512,
    )  # preset over recipe, flag over preset
    assert (architecture.num_hidden_layers, architecture.head_dim) == (5, 64)  # update over flag
    assert architecture.vocab_size == 288  # the recipe where nobody else speaks


def test_preset_leaves_nothing_of_another():
    architecture = configured("--config=configs/debug.py", "--load_llama_config=65b").architecture
    assert architecture.rms_norm_eps == 1e-5
    tree = default_config("65b")
    assert (tree.llama.num_hidden_layers, tree.load_llama_config) == (80, "65b")


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_recipe_may_set_every_size_of_its_preset(tmp_path, where):
    """It was refused: none of the preset's sizes was left, as where the preset's name had been set too late."""
    sizes = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 8}
    lines = [f"    c.llama.{name} = {value}" for name, value in sizes.items()]
    late = ["    c.load_llama_config = '1b'"] if where == "before" else []
    start = "    c = default_config()" if late else "    c = default_config('debug')"
    body = ["from ringbpt.config import default_config", "def get_config():", start, *lines, *late, "    return c"]
    recipe = tmp_path / "mine.py"
    recipe.write_text("\n".join(body))
    if late:
        assert "load_llama_config is set too late: start from default_config('1b')" in refusal(f"--config={recipe}")
    else:
        architecture = parse_args([f"--config={recipe}"]).llama
        assert {name: architecture[name] for name in sizes} == sizes


def test_recipe_of_the_users_own(tmp_path, monkeypatch):
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        "from ringbpt.config import default_config\n"
        "def get_config():\n"
        "    c = default_config('debug')\n"
        "    c.update_llama_config = 'dict(theta=5e5, num_hidden_layers=3)'\n"
        "    c.llama.num_key_value_heads = 2\n"
        "    return c\n"
    )
    config = configured(f"--config={recipe}", "--llama.num_hidden_layers=7")
    architecture = config.architecture
    assert (architecture.theta, architecture.num_hidden_layers, architecture.num_key_value_heads) == (5e5, 7, 2)
    again = configured(*shlex.split(format_config(parse_args([f"--config={recipe}", "--llama.num_hidden_layers=7"]))))
    assert (again.architecture, again.execution) == (architecture, config.execution)
    monkeypatch.chdir(tmp_path)  # from somewhere else both paths are found
    assert parse_args(["--config=mine.py"]).llama.theta == 5e5
    assert parse_args([DEBUG]).llama.vocab_size == 288


@pytest.mark.parametrize(
    ("body", "fragments"),
    [
        ("    c.totl_steps = 3\n    return c", (":4: ", 'Did you mean "total_steps"')),
        ("    c.seed = 'x'\n    return c", (":4: ", "seed")),
        ("    c.load_llama_config = '1b'\n    return c", ("default_config('1b')",)),
        ("    return default_config('2b')", (":4: ", "--load_llama_config=")),
        ("    return c +", (":4: ", "SyntaxError")),
        ("    return 3", ("get_config() gave a int",)),
        ("    c.update_llama_config = 'dict(x=1)'\n    return c", ("the model has no 'x'",)),
        ("    with c.unlocked():\n        c.llama.headdim = 3\n    return c", ("llama.headdim", "head_dim")),
        ("    with c.unlocked(), c.ignore_type():\n        c.llama = 3\n    return c", ("--llama is a group",)),
        ("    c.llama.head_dim = 'x'\n    return c", ("--llama.head_dim='x' is not a whole number",)),
    ],
)
def test_recipe_mistakes_name_the_line(tmp_path, body, fragments):
    recipe = tmp_path / "bad.py"
    recipe.write_text(
        f"from ringbpt.config import default_config\ndef get_config():\n    c = default_config()\n{body}\n"
    )
    message = refusal(f"--config={recipe}")
    for fragment in fragments:
        assert fragment in message


# --- how flags are written ---


def test_ways_to_write_a_flag():
    line = (
        "--seed 7 --dtype=fp32 --autoresume --nosave_final --llama.noscan_layers --logger.online true "
        "--log_all_worker=1 --optimizer.adamw_optimizer.lr=1 --load_checkpoint '' --llama.head_dim=None "
        "--llama.num_key_value_heads=4 --llama.mesh_dim="
    )
    tree = parse_args(shlex.split(line))
    assert (tree.seed, tree.dtype, tree.autoresume, tree.save_final) == (7, "fp32", True, False)
    assert (tree.llama.scan_layers, tree.logger.online, tree.log_all_worker) == (False, True, True)
    assert tree.optimizer.adamw_optimizer.lr == 1.0
    assert isinstance(tree.optimizer.adamw_optimizer.lr, float)
    assert (tree.llama.head_dim, tree.llama.num_key_value_heads, tree.llama.mesh_dim) == (None, 4, None)


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (["--totl_steps=3"], ("--totl_steps", "--total_steps")),
        (["--mesh-dim=1,1,1,1"], ("--mesh_dim?",)),
        (["--lr=3"], ("--optimizer.adamw_optimizer.lr?",)),
        (["--llama.hiden_size=3"], ("--llama.hidden_size?",)),
        (["--llama=3"], ("group",)),
        (["--mesh_shape=1,1,1,1"], ("--mesh_shape is no flag",)),
        (["train"], ("'train' is no flag", "--name=value")),
        (["-seed=3"], ("'-seed=3'",)),
        (["--seed"], ("--seed needs a value", "--seed=42")),
        (["--seed", "--autoresume"], ("--seed needs a value",)),
        (["--seed=1", "--seed=2"], ("--seed is given twice",)),
        (["--autoresume", "--noautoresume"], ("--autoresume is given twice",)),
        (["--noseed"], ("--noseed is no flag", "--seed?")),
        (["--total_steps=1e4"], ("--total_steps='1e4'", "10000")),
        (["--total_steps=ten"], ("whole number", "10000")),
        (["--total_steps="], ("whole number",)),
        (["--total_steps=" + "9" * 5000], ("whole number",)),
        (["--total_steps=" + "9" * 50], ("whole number",)),
        (["--autoresume=maybe"], ("True or False",)),
        (["--optimizer.adamw_optimizer.lr=__import__('os')"], ("is not a number",)),
        (["--load_checkpoint=params::a\0b"], ("NUL",)),
        (["--load_llama_config=7B"], ("--load_llama_config=7b",)),
        (["--config=configs/nope.py"], ("configs/nope.py", "configs/debug.py")),
        (["--config=README.md"], ("README.md is no recipe",)),
    ],
)
def test_flags_written_wrong(argv, fragments):
    message = refusal(*argv)
    for fragment in fragments:
        assert fragment in message


# --- update_llama_config ---


def test_literals():
    text = "dict(a=1, b='x', c=True, d=-2.5, e=None, f=dict(g=(1, [2])))"
    assert read_literals("-", text) == {"a": 1, "b": "x", "c": True, "d": -2.5, "e": None, "f": {"g": [1, [2]]}}
    assert read_literals("-", "{'a': 1, 'b': {'c': 2}}") == {"a": 1, "b": {"c": 2}}
    assert read_literals("-", " ") == read_literals("-", "dict()") == {}


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch /tmp/never')",
        "().__class__.__base__.__subclasses__()",
        "9**9**9",
        "dict(theta=9**9**9)",
        "dict(theta=1+1)",
        "dict(theta=abs(1))",
        "dict(**{'theta': 1})",
        "{**{}}",
        "{theta: 1}",
        "dict([('theta', 1)])",
        "dict(theta=1, theta=2)",
        "dict(theta=b'1')",
        "dict(theta=1j)",
        "dict(theta=f'{1}')",
        "dict(theta=...)",
        "dict(theta=[x for x in (1,)])",
        "dict.fromkeys('a')",
        "dict(theta=1",
        "[1]",
        "dict(theta=dict(a=dict(a=dict(a=dict(a=1)))))",
        "(" * 8000,
        "dict(theta=" + "not " * 2000 + "1)",
        "dict(theta=" + "-" * 8000 + "1)",
        "dict(theta=" + "1" * 9000 + ")",
        "dict(theta=1" + " " * 9000 + ")",
        "dict(theta='1\0')",
        "dict(theta='much')",
        "dict(theta=(1,))",
        "dict(scan_mlp=2)",
        "dict(head_dim=True)",
        "dict(head_dim=64.0)",
        "dict(remat_block=1)",
    ],
)
def test_update_refuses_what_is_no_literal_of_the_type(text):
    assert refusal(f"--update_llama_config={text}").startswith("--update_llama_config")


def test_update_names_the_nearest_key():
    assert "'scan_mlp_chunk_size'" in refusal("--update_llama_config=dict(scan_mlp_chunksize=3)")


def test_mesh_dim_in_update_must_be_the_mesh():
    same = configured(DEBUG, "--mesh_dim=1,2,1,-1", "--update_llama_config=dict(mesh_dim='fsdp:2,sp:4')")
    assert same.mesh_shape == (1, 2, 1, 4)
    for other in ("1,1,1,8", "1,1,4,64", "a"):
        message = refusal(DEBUG, "--mesh_dim=1,2,1,4", f"--update_llama_config=dict(mesh_dim='{other}')")
        assert "--mesh_dim='1,2,1,4'" in message and f"'{other}'" in message


# --- names that other trainers use ---


@pytest.mark.parametrize("alias", ["ring_attn_size", "sequence_parallel_degree", "sequence_parallel_size"])
def test_sp_aliases(alias):
    assert configured(DEBUG, f"--{alias}=4").mesh_shape == (1, 2, 1, 4)  # the recipe's 1,1,1,-1: fsdp takes the rest
    assert configured(DEBUG, "--mesh_dim=1,-1,2,1", f"--{alias}=2").mesh_shape == (1, 2, 2, 2)
    assert configured(DEBUG, "--mesh_dim=!sp:4,dp:2", f"--{alias}=4").mesh_shape == (2, 1, 1, 4)
    assert "contradict" in refusal(DEBUG, "--mesh_dim=1,1,1,8", f"--{alias}=4")
    assert "contradict" in refusal(DEBUG, f"--{alias}=4", "--context_parallel_size=2")
    assert f"--{alias}=0" in refusal(DEBUG, f"--{alias}=0")
    assert "--mesh_dim='a'" in refusal("--mesh_dim=a", f"--{alias}=4")


def test_other_aliases():
    config = configured(DEBUG, "--ring_attn_func=zigzag-ring", "--cutoff_len=256")
    assert (config.execution.attention_type, config.execution.sequence_layout) == ("ring_blockwise", "zigzag")
    assert config.train_dataset.seq_length == config.eval_dataset.seq_length == 256
    gathered = configured(DEBUG, "--ring_head_stride=4")
    assert (gathered.execution.sequence_parallel, gathered.execution.heads_k_stride) == ("all_gather", 4)
    assert configured(DEBUG, "--ring_attn_func=varlen_llama3", "--heads_k_stride=2").execution.heads_k_stride == 2
    for alias in ("max_len", "sequence_len"):
        tree = parse_args([f"--{alias}=512", "--train_dataset.type=json"])
        assert tree.train_dataset.json_dataset.seq_length == 512
        assert tree.train_dataset.python_dataset.seq_length == 1024
    for alias in ("packing_samples", "sample_packing"):
        assert parse_args([f"--{alias}"]).train_dataset.packing == "first_fit"
        assert parse_args([DEBUG, f"--no{alias}"]).train_dataset.packing == "concat"


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (["--ring_attn_func=batch_ring", "--heads_k_stride=2"], ("all_gather", "leave one of them out")),
        (["--ring_attn_func=stripe"], ("none of", "batch_ring")),
        (["--max_len=64", "--train_dataset.json_dataset.seq_length=32"], ("--max_len=64", "seq_length=32")),
        (["--max_len=64", "--cutoff_len=32"], ("--cutoff_len=32", "=64")),
        (["--ring_attn_func=batch_ring", "--llama.attention_type=standard"], ("ring_blockwise", "=standard")),
        (["--sample_packing", "--train_dataset.packing=concat"], ("first_fit", "=concat")),
    ],
)
def test_alias_mistakes(argv, fragments):
    message = refusal(*argv)
    for fragment in fragments:
        assert fragment in message


# --- what parse derives ---


def test_derived_values():
    config = configured(DEBUG)
    assert (config.architecture.num_key_value_heads, config.architecture.head_dim) == (4, 32)
    assert config.execution.sequence_layout == "zigzag"
    assert configured(DEBUG, f"{SEQ}=504").execution.sequence_layout == "contiguous"
    assert configured(DEBUG, f"{EVAL_SEQ}=504").execution.sequence_layout == "contiguous"
    assert configured(DEBUG, f"{EVAL_SEQ}=504", "--eval_steps=0").execution.sequence_layout == "zigzag"
    assert configured(DEBUG, "--llama.sequence_layout=striped").execution.sequence_layout == "striped"
    assert configured(DEBUG, "--mesh_dim=8,1,1,1").execution.sequence_layout == "contiguous"
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]


def test_parse_leaves_the_tree_alone():
    tree = parse_args([DEBUG])
    before = tree.to_json()
    assert parse(tree, 8) == parse(tree, 8)
    assert tree.to_json() == before


# --- showing it ---


def test_format_config_is_a_command_line():
    argv = [
        DEBUG,
        "--update_llama_config=dict(theta=5e5)",
        "--logger.experiment_note=it's $HOME",
        "--load_llama_config=1b",
    ]
    for shown in (parse_args(argv), configured(*argv)):
        lines = format_config(shown).splitlines()
        assert lines == sorted(lines)
        assert "--llama.theta=500000.0" in lines
        again = configured(*shlex.split(" ".join(lines)))
        assert dataclasses.replace(again, update_llama_config="dict(theta=5e5)") == configured(*argv)


def test_what_is_left_to_be_derived_can_be_written_out():
    lines = format_config(parse_args(["--load_llama_config=debug"])).splitlines()
    assert "--llama.attention_type=auto" in lines and "--optimizer.adamw_optimizer.lr=None" in lines
    assert configured(*shlex.split(" ".join(lines))) == configured("--load_llama_config=debug")


def test_to_dict_is_json():
    values = to_dict(configured(DEBUG))
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["mesh_shape"] == [1, 1, 1, 8]


def test_help_is_short_and_true():
    text = help_text()
    assert len(text.splitlines()) < 70
    shown = {name: flag.shown for name, flag in (ENTRY_FLAGS | RUN_FLAGS).items() if flag.shown}
    assert set(shown.values()) == set(SECTIONS)
    for name in shown:
        assert name.startswith("eval_dataset.") or f"--{name}" in text


def test_help_of_a_group_and_of_an_entry(capsys):
    assert printed_help(["--seed=1", "--help=optimizer"], "train")
    shown = capsys.readouterr().out
    for name, flag in RUN_FLAGS.items():
        assert (f"  --{name}" in shown) == name.startswith("optimizer.")
        if name.startswith("optimizer."):
            assert flag.help in shown and ", ".join(flag.choices) in shown
    with pytest.raises(UserError, match="did you mean optimizer"):
        printed_help(["--help=optimiser"], "train")
    assert printed_help(["-h"], doc="what it does", own=OWN)
    assert "what it does\n\n  --depth=3" in (shown := capsys.readouterr().out) and "(a, b)" in shown
    assert not printed_help(["--seed=1"], "train")
    assert help_text("train", "all").count("no effect: ") == sum(bool(without_effect(name)) for name in RUN_FLAGS)


# --- the entries ---

OWN = {
    "depth": Flag(int, 3, "how deep", at_least=1, at_most=9),
    "kind": Flag(str, "a", "which", choices=("a", "b")),
    "from": Flag(str, "", "PREFIX::PATH", prefixes=("params", "flax_params"), required=True),
    "share": Flag(float, 0.5, "of all", above=0, below=1),
    "quick": Flag(bool, False, "or not"),
    "stop": Flag(list, [], "may be given several times"),
}


def test_an_entrys_own_flags():
    line = "--from params::x --quick --depth 4 --stop=a --stop b"
    wanted = {"depth": 4, "kind": "a", "from": "params::x", "share": 0.5, "quick": True, "stop": ["a", "b"]}
    assert read_flags(line.split(), OWN) == wanted
    assert read_flags(["--quick", "no", "--from=params::x"], OWN)["quick"] is False
    assert read_flags(["--noquick", "--from=params::x"], OWN)["quick"] is False
    values, others = split_flags(["--seed=1", "x", "--depth=2", "--nosave_final"], OWN)
    assert (values["depth"], values["from"], others) == (2, "", ["--seed=1", "x", "--nosave_final"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "--from is missing: PREFIX::PATH"),
        ("--from", "--from needs a value: --from=..."),
        ("--depth --quick", "--depth needs a value: --depth=3"),
        ("--depth=0", "--depth=0 is below 1: use --depth=1 or more"),
        ("--depth=10", "--depth=10 is above 9: use --depth=9 at most"),
        ("--share=0", "--share=0.0 must be above 0: try --share=0.5"),
        ("--share=1", "--share=1.0 must be below 1: try --share=0.5"),
        ("--share=nan", "--share=nan is not a finite number: try --share=0.5"),
        ("--kind=c", "--kind='c' is none of a, b: did you mean --kind='a'?"),
        ("--from=param::x", "did you mean 'params::x'?"),
        ("--from=x", "--from='params::x', or one of flax_params:: before the path"),
        ("--depth=1 --depth=2", "--depth is given twice, the second time as '2'"),
        ("--deep=1", "'--deep' is no flag here: did you mean --depth?"),
        ("--dept=1", "--dept is no flag: did you mean --depth?"),
        ("--from=params::x more", "'more' is no flag here"),
    ],
)
def test_an_entrys_own_flags_written_wrong(line, message):
    with pytest.raises(UserError) as caught:
        read_flags(line.split(), OWN)
    assert message in str(caught.value)


def test_run_main(capsys):
    def main(argv):
        if argv == ["interrupt"]:
            raise KeyboardInterrupt
        raise UserError("a\nb", code=4)

    assert run_main(main, ["x"]) == 4
    assert capsys.readouterr().err == "error: a b\n"
    assert run_main(main, ["interrupt"]) == 130
    assert run_main(lambda argv: None, []) == 0
    assert run_main(lambda argv: 3, []) == 3
    with pytest.raises(ZeroDivisionError):
        run_main(lambda argv: 1 // 0, [])


def test_answers_without_jax():
    code = (
        "import sys\nfrom ringbpt.config import *\n"
        "parse(parse_args([]), 8); help_text(); assert not {'jax', 'numpy'} & set(sys.modules)\n"
        "sys.exit(run_main(lambda argv: parse(parse_args(argv), 8) and 0))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "--sead=1"],
        check=False,
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: --sead is no flag: did you mean --seed?\n"


def test_other_trainers_names_of_the_data():
    tree = parse_args(
        [
            "--dataset=a.jsonl,b.csv",
            "--dataset_probs",
            ".7,.3",
            "--max_samples=9",
            "--input_key=q",
            "--apply_chat_template",
        ]
    )
    assert (tree.train_dataset.type, tree.train_dataset.files_dataset.path) == ("files", "a.jsonl:.7,b.csv:.3")
    assert tree.train_dataset.max_samples == 9 and tree.eval_dataset.text_processor.input_key == "q"
    assert tree.train_dataset.text_processor.apply_chat_template is True
    with pytest.raises(UserError, match="has 1 numbers and --dataset=a,b has 2 names: give one for each"):
        parse_args(["--dataset=a,b", "--dataset_probs=1"])
    with pytest.raises(UserError, match="goes with --dataset=a,b, which is not given"):
        parse_args(["--dataset_probs=1"])
