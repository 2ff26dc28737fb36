"""docs/migrating.md: other trainers' commands are understood, or their tables say what stands beside them.

A block ```sh or ```yaml under `<!-- theirs: TRAINER -->` is what a peer's own documentation has; the bash block below
it says the same here. OpenRLHF's commands are parsed word for word and are the configuration of ours; of the others
every name stands in their table, and where that gives a flag of ours a value, our command has it.
"""

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

from ringbpt.config import ALIASES, Config, UserError, parse, parse_args
from ringbpt.config.aliases import MEANINGS
from ringbpt.config.openrlhf import DOTTED, NOTHING_TO_SAY, REFUSED

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "migrating.md").read_text()
PAIR = re.compile(
    r"<!-- theirs: (?P<trainer>[\w-]+) -->\n```(?:sh|yaml)\n(?P<theirs>.*?)^```\n.*?^```bash\n(?P<ours>.*?)^```",
    re.MULTILINE | re.DOTALL,
)
MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 256, "hidden_size": 512,
    "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 16, "num_key_value_heads": 8,
    "max_position_embeddings": 40960, "rms_norm_eps": 1e-5,
}  # fmt: skip


class Pair(NamedTuple):
    trainer: str
    theirs: str
    ours: list[str]  # without the program

    @property
    def name(self) -> str:
        return f"{self.trainer}-{next(word for word in self.ours if 'experiment_id' in word).partition('=')[2]}"


def words(text: str) -> list[str]:
    return shlex.split(text.replace("\\\n", " "))


PAIRS = [Pair(each["trainer"], each["theirs"], words(each["ours"])[3:]) for each in PAIR.finditer(PAGE)]


def of(*trainers: str) -> list:
    return [pytest.param(pair, id=pair.name) for pair in PAIRS if pair.trainer in trainers]


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch):
    """A folder for each model that the page names, as on the hub."""
    monkeypatch.chdir(tmp_path)
    for name in {*re.findall(r"huggingface::([\w./-]+)", PAGE), "a/b", "c/d"}:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps(MODEL))


def config_of(argv: list[str], devices: int = 8) -> Config:
    """The configuration, without the evaluation where none is made."""
    config = parse(parse_args(argv), devices)
    return config if config.eval_steps else dataclasses.replace(config, eval_dataset=Config().eval_dataset)


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(parse_args(list(argv)), 8)
    assert caught.value.code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


def in_ours(theirs: str, total_steps: str) -> list[str]:
    """What the page says to change of a command: the program, and the steps that nobody else can know."""
    deepspeed, module, program, *rest = words(theirs)
    assert (deepspeed, module) == ("deepspeed", "--module")
    return [f"--objective={program.removeprefix('openrlhf.cli.train_')}", total_steps, *rest]


# --- OpenRLHF ---


@pytest.mark.parametrize("pair", of("openrlhf"))
def test_a_command_of_openrlhf_is_ours(pair):
    [total_steps] = [word for word in pair.ours if word.startswith("--total_steps=")]
    assert config_of(in_ours(pair.theirs, total_steps)) == config_of(pair.ours)


@pytest.mark.parametrize("pair", of("openrlhf"))
def test_the_order_of_a_command_does_not_matter(pair):
    """What a name means depends on the type of the data set, whose name may stand behind it."""
    first, steps, *rest = in_ours(pair.theirs, "--total_steps=7")
    flags: list[list[str]] = []
    for word in rest:
        if word.startswith("--"):
            flags.append([])
        flags[-1].append(word)
    backward = [word for flag in reversed(flags) for word in flag]
    assert config_of([first, steps, *rest]) == config_of([*backward, steps, first])


def test_both_spellings_mean_the_same():
    assert set(DOTTED) <= set(ALIASES)
    for dotted, old in DOTTED.items():
        assert MEANINGS[dotted] is MEANINGS[old]


BASE = ["--objective=dpo", "--total_steps=100", "--pretrain=a/b", "--max_len=512", "--train_batch_size=16"]


ADAMW, HUB = "--optimizer.adamw_optimizer", "--train_dataset.huggingface_dataset"
MUON = "--optimizer.muon_optimizer"
FILES = "--train_dataset.type=files --train_dataset.files_dataset"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("--ipo", "--objective=ipo --preference.ipo_sum"),
        ("--model.ipo_enable --model.beta 0.2", "--objective=ipo --preference.ipo_sum --preference.beta=0.2"),
        ("--label_smoothing 0.1", "--objective=cdpo --preference.label_smoothing=0.1"),
        ("--label_smoothing=0", ""),
        ("--ref_pretrain c/d", "--reference_checkpoint=huggingface::c/d"),
        ("--adam_betas 0.9 0.98", f"{ADAMW}.b1=0.9 {ADAMW}.b2=0.98"),
        ("--adam.betas 0.8 0.9 --l2 0", f"{ADAMW}.b1=0.8 {ADAMW}.b2=0.9 {ADAMW}.weight_decay=0"),
        ("--lr_warmup_ratio=0.031", f"{ADAMW}.lr_warmup_steps=4"),
        ("--min_lr_ratio=0.2 --learning_rate=1e-5", f"{ADAMW}.lr=1e-5 {ADAMW}.end_lr=2e-6"),
        (
            "--muon.lr=0.01 --adam.lr=1e-4 --optim=muon",
            f"--optimizer.type=muon {MUON}.lr=0.01 {MUON}.adam_lr=1e-4",
        ),
        (
            "--ring_attn_size=2 --ds_tensor_parallel_size=2 --micro_train_batch_size=2",
            "--mesh_dim=1,-1,2,2 --optimizer.accumulate_gradient_steps=4",
        ),
        ("--muon.lr=0.01 --min_lr_ratio=0.5 --optim=muon", f"{MUON}.lr=0.01 {MUON}.end_lr=0.005 --optimizer.type=muon"),
        ("--nogradient_checkpointing --bf16", ""),
        ("--save_steps=50", "--save_model_freq=50 --checkpointer.save_optimizer_state"),
        ("--save_steps=50 --disable_ds_ckpt", "--save_model_freq=50"),
        ("--dataset=x.jsonl,y.jsonl --dataset_probs=.7,.3", f"{FILES}.path=x.jsonl:.7,y.jsonl:.3"),
        ("--dataset=org/set --dataset_split=x", f"--train_dataset.type=huggingface {HUB}.path=org/set {HUB}.split=x"),
        ("--dataset=data/set.jsonl", f"{FILES}.path=data/set.jsonl"),
        ("--use_wandb --wandb_project=p", "--logger.online --logger.project_id=p"),
        ("--lora_rank=0 --nll_loss_coef=0 --zero_stage=2 --flash_attn --ref_offload", ""),
        ("--lora_rank=64", "--lora.rank=64 --lora.alpha=16"),
        (
            "--ds.lora.rank 8 --ds.lora.alpha 32 --ds.lora.target_modules q_proj v_proj --ds.load_in_4bit",
            "--lora.rank=8 --lora.alpha=32 --lora.target_modules=q_proj,v_proj --lora.base_dtype=nf4 "
            "--lora.double_quantization",
        ),
    ],
)
def test_what_a_flag_means(theirs, ours):
    """Ours win over what they stand for in BASE."""
    data = (re.findall(r"--train_dataset.type=(\w+)", ours) or ["json"])[0]
    source = f"--train_dataset.{data}_dataset"
    base = ["--load_checkpoint=huggingface::a/b", f"{source}.seq_length=512", f"{source}.batch_size=16", BASE[1]]
    objective = [] if "--objective" in ours else [BASE[0]]
    assert config_of([*BASE, *theirs.split()]) == config_of([*base, *objective, *ours.split()])


@pytest.mark.parametrize(
    "name", [name for name in ALIASES if name in NOTHING_TO_SAY or DOTTED.get(name) in NOTHING_TO_SAY]
)
def test_what_needs_no_saying_changes_nothing(name):
    value = {bool: "True", int: "1", str: "x"}[ALIASES[name].kind]
    assert parse_args([*BASE, f"--{name}={value}"]) == parse_args(BASE)


@pytest.mark.parametrize("name", [name for name in ALIASES if name in REFUSED or DOTTED.get(name) in REFUSED])
def test_what_cannot_be_meant_is_refused(name):
    kind, harmless, _ = REFUSED[DOTTED.get(name, name)]
    value = {bool: str(False in harmless), int: "64", float: "0.25", str: "x"}[kind]
    assert refusal(*BASE, f"--{name}={value}").startswith(f"--{name}={value}: ")
    for one in harmless:
        assert parse_args([*BASE, f"--{name}={one}"]) == parse_args(BASE)


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (["--nll_loss_coef=0.2"], ("--preference.nll_coefficient=0.2",)),
        (["--lora_dropout=0.1"], ("without dropout",)),
        (["--load_in_4bit"], ("--lora.base_dtype", "--lora.rank=0 gives none")),
        (["--ipo", "--label_smoothing=0.1"], ("--ipo", "label_smoothing")),
        (["--lr_scheduler=cosine"], ("--optimizer.schedule=warmup_cosine", "end_lr=0")),
        (["--min_lr_ratio=0.2"], ("--learning_rate",)),
        (["--adam_betas=0.9"], ("--adam_betas=0.9,0.95",)),
        (["--use_wandb=abc"], ("wandb login",)),
        (["--bf16=False"], ("--dtype=fp32",)),
        (["--dataset=org/a,org/b"], ("org/a", "hub")),
        (["--load_checkpoint=params::x"], ("--pretrain=a/b", "--load_checkpoint=params::x")),
        (["--micro_train_batch_size=3"], ("batch_size=16", "--optimizer.rows_at_a_time=3", "batch_size=24")),
        (["--micro_train_batch_size=1", "--optimizer.accumulate_gradient_steps=4"], ("=2, but", "=4: leave one")),
        (["--eval_steps=-1", "--eval_dataset.json_dataset.path=x"], ("once an epoch", "--eval_steps=N")),
        (["--model.beta=0.1", "--beta=0.2"], ("--preference.beta=0.1", "0.2")),
    ],
)  # fmt: skip
def test_refusals_name_ours(argv, fragments):
    message = refusal(*BASE, *argv)
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize("argv", ["--adam_betas 0.9 0.98 --pretrain a/b", "--pretrain a/b --adam.betas 0.9 0.98"])
def test_two_numbers_stand_anywhere(argv):
    assert config_of(argv.split()).optimizer.adamw_optimizer.b2 == 0.98


def test_epochs_want_steps_beside_them():
    assert "--total_steps=N" in refusal("--pretrain=a/b", "--max_epochs=1")


def test_a_lone_load_checkpoint_is_theirs_only_beside_their_model():
    """An empty variable behind our own flag would start a run from nothing."""
    assert config_of(["--pretrain=a/b", "--load_checkpoint"]).autoresume
    assert config_of(["--load_checkpoint", "--model.model_name_or_path", "a/b"]).autoresume
    assert "--load_checkpoint needs a value" in refusal("--load_checkpoint", "--objective=sft")
    assert "--eval_steps=-1" in refusal("--eval_steps=-1", "--load_llama_config=debug")


# --- Axolotl and 360-LLaMA-Factory ---


def table(trainer: str) -> dict[str, str]:
    """Their name -> the cell that says it in ours, of the trainer's chapter."""
    chapter = next(part for part in PAGE.split("\n## ") if part.partition("\n")[0].lower() == trainer)
    rows = re.findall(r"^\| (`.*?) \| (.*?) \| .*\|$", chapter, re.MULTILINE)
    return {name: ours for names, ours in rows for name in re.findall(r"`([\w.]+)`", names)}


def settings(text: str) -> dict[str, str]:
    """The flags of a command, or the outer keys of a YAML, and their values."""
    if "--" in text:
        found = re.findall(r"--(\w+)(?:[ =]([^\s-]\S*))?", text.partition("train.py")[2])
        return {name: value or "True" for name, value in found}
    return {key: value.strip() for key, value in re.findall(r"^(\w+):(.*)$", text, re.MULTILINE)}


def same(one: str, other: str) -> bool:
    try:
        return float(one.replace("_", "")) == float(other)
    except ValueError:
        return one == other


@pytest.mark.parametrize("pair", of("axolotl", "360-llama-factory"))
def test_our_command_says_what_their_settings_say(pair):
    rows, given = table(pair.trainer), dict(word.removeprefix("--").partition("=")[::2] for word in pair.ours)
    for name, value in settings(pair.theirs).items():
        assert name in rows, f"{name} has no row"
        flag = re.fullmatch(r"`--([\w.]+)=(\S+)`", rows[name])
        if flag and value.lower() != "false":
            assert same(flag[2].replace("VALUE", value), given.get(flag[1], "")), (name, value, flag[0])
    config_of(pair.ours, 16 if "2nodes" in pair.theirs else 8)


def test_each_peer_has_commands():
    assert {pair.trainer: sum(each.trainer == pair.trainer for each in PAIRS) for pair in PAIRS} == {
        "openrlhf": 4, "axolotl": 3, "360-llama-factory": 2,
    }  # fmt: skip
