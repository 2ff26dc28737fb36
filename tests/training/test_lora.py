"""Runs that train low-rank pairs: what stays, what is stored, how they go on, and what they leave."""

import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from ringbpt import evaluate, generate
from ringbpt.checkpoint.export import logits, to_huggingface
from ringbpt.checkpoint.huggingface import to_ours
from ringbpt.checkpoint.load import load_checkpoint, load_model
from ringbpt.checkpoint.peft import read_adapter
from ringbpt.checkpoint.store import StoredStep, Wanted
from ringbpt.config import UserError, run_main
from ringbpt.mesh import make_mesh
from ringbpt.model.llama import Model
from ringbpt.model.quantised import quantise
from ringbpt.model.weights import part_of
from ringbpt.training.metrics import read_rows
from ringbpt.training.state import StateLayout, divide
from tests.training.test_loop import FULL, TINY, UNSAVED, configured, losses, refusal, train
from tests.training.test_reference import PAIRED, TEXT, pairs

pytestmark = pytest.mark.usefixtures("compiled_once")
WIDE = TINY[0].replace("hidden_size=32,intermediate_size=64", "hidden_size=64,intermediate_size=384")  # whole blocks
RING = "--llama.attention_type=ring_blockwise"
LORA = ("--lora.rank=4", "--lora.alpha=8", "--optimizer.adamw_optimizer.lr=0.02")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "texts.jsonl").write_text(
        "".join(json.dumps({"text": f"say {n} ants: {n} ants"}) + "\n" for n in range(80))
    )
    (folder / "pairs.jsonl").write_text(pairs(40))
    return (f"--train_dataset.json_dataset.path={folder}/texts.jsonl", f"--train_dataset.cache_dir={folder}/cache")


@pytest.fixture(scope="module")
def base(data, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base")
    return f"--load_checkpoint=params::{train(folder, *data, *FULL, '--total_steps=2', name='base')}"


@pytest.fixture(scope="module")
def run(data, base, tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("lora"), *data, base, *LORA, *FULL, "--total_steps=6")


def stored(run: Path) -> dict[str, np.ndarray]:
    step = StoredStep(max((run / "checkpoints").iterdir(), key=lambda path: int(path.name)))
    return {name: step.read("params", name) for name in step.dtypes("params")}


def test_pairs_alone_are_stored_and_learn(run, base):
    names = {f"layers.w_{name}_{part}" for name in ("q", "k", "v", "o", "gate", "up", "down") for part in "ab"}
    found = stored(run)
    assert found.keys() == names
    assert all(x.dtype == np.float32 for x in found.values())
    assert all(np.abs(x).max() > 0 for x in found.values())
    assert losses(run)[6] < losses(run)[1]


def test_the_optimizer_holds_two_numbers_of_each_of_a_pair(base):
    config = configured(base, *LORA)
    abstract = StateLayout(config, Model.of(config, make_mesh((1, 1, 1, 1)))).abstract
    trained = sum(x.size for x in jax.tree.leaves(abstract.trained))
    assert sum(x.size for x in jax.tree.leaves(abstract.opt_state)) <= 2 * trained + 8
    assert "unembed" in abstract.frozen and set(abstract.trained) == {"layers"}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_base_keeps_its_bits(data, base, tmp_path, dtype):
    """20 steps, then its weights by those of the checkpoint they came from."""
    from ringbpt.training import loop

    kept = []
    original = loop.make_train_step

    def watched(layout, objective):
        step = original(layout, objective)

        def watching(state, batch):
            result = step(state, batch)
            kept.append(result[0].frozen)
            return result

        watching.lower = step.lower
        return watching

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_train_step", watched)
        train(
            tmp_path,
            *data,
            base,
            *LORA,
            "--total_steps=20",
            f"--lora.base_dtype={dtype}",
            "--nosave_final",
            "--save_minutes=0",
        )
    assert len(kept) == 20
    _, params = load_model(base.removeprefix("--load_checkpoint="), (1, 1, 1, 1), dtype)
    for name in ("w_q", "w_down"):
        assert kept[-1]["layers"][name].dtype == params["layers"][name].dtype
        np.testing.assert_array_equal(kept[-1]["layers"][name], params["layers"][name])
    np.testing.assert_array_equal(kept[-1]["unembed"], params["unembed"])


def test_it_goes_on_bit_by_bit_and_beside_no_other_weights(data, base, run, tmp_path):
    train(tmp_path, *data, base, *LORA, *FULL, "--total_steps=3")
    train(tmp_path, *data, base, *LORA, *FULL, "--total_steps=6", "--autoresume")
    assert losses(tmp_path / "run") == losses(run)
    for name, array in stored(run).items():
        np.testing.assert_array_equal(stored(tmp_path / "run")[name], array)
    other = train(tmp_path, *data, *FULL, "--total_steps=1", "--seed=7", name="other")
    again = refusal(
        tmp_path, *data, f"--load_checkpoint=params::{other}", *LORA, *FULL, "--total_steps=9", "--autoresume"
    )
    assert "its weights are not those beside which the adapters of" in again


def test_the_optimizers_state_may_be_in_the_hosts_memory(data, base, run, tmp_path):
    away = train(tmp_path, *data, base, *LORA, *UNSAVED, "--total_steps=6", "--optimizer.offload_state")
    assert [*losses(away).values()] == pytest.approx([*losses(run).values()], rel=1e-6)


def test_what_it_leaves_is_what_it_was(run, base, tmp_path, capsys):
    """The adapter folder beside the base is the model that was trained, here by what it says of a text."""
    found = read_adapter(run / "adapter", configured(base, *LORA).architecture)
    for name, array in found.layers.items():
        if not name.endswith("_scale"):
            np.testing.assert_array_equal(array, stored(run)[f"layers.{name}"], err_msg=name)
    assert found.layers["w_q_scale"].tolist() == [2.0, 2.0]
    settings = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["task_type"]) == (4, 8, "CAUSAL_LM")
    to_huggingface(base.partition("=")[2], tmp_path / "merged", dtype="fp32", adapter=run / "adapter")
    said = []
    for words in ([base], [base, f"--adapter={run}/adapter"], [f"--load_checkpoint=huggingface::{tmp_path}/merged"]):
        assert (
            run_main(generate.main, [*words, "--tokenizer=bytes", "--prompt=say 3 ants:", "--max_new_tokens=12"]) == 0
        )
        said.append(capsys.readouterr().out)
    assert said[0] != said[1] == said[2]
    assert run_main(generate.main, [f"--load_checkpoint=params::{run}", "--prompt=a"]) == 2
    assert f"{base.removeprefix('--load_checkpoint=')} --adapter={run}/adapter" in capsys.readouterr().err


def test_the_reference_is_the_base(data, base, tmp_path):
    """DPO begins at ln 2, and goes on at the same losses whichever way the base is asked."""
    path = data[0].replace("texts.jsonl", "pairs.jsonl")
    found = []
    for how in ("columns", "step"):
        words = (*data, path, *PAIRED[:2], TEXT[0], base, *LORA, f"--reference={how}", *UNSAVED, "--total_steps=3")
        rows = read_rows(train(tmp_path, *words, name=how) / "metrics.jsonl")
        found.append([row["loss"] for row in rows])
    assert found[0][0] == pytest.approx(np.log(2), abs=1e-6)
    assert found[1] == pytest.approx(found[0], abs=1e-6)


def test_an_adapter_talks(run, base, data, tmp_path, monkeypatch, capsys):
    """Chat and evaluation by --adapter; what it says is not what its base says."""
    texts, said = data[0].partition("=")[2], []
    for more in ((), (f"--adapter={run}/adapter",)):
        monkeypatch.setattr("sys.stdin", io.StringIO("say 3 ants\n\n"))
        chat = [base, *more, "--chat", "--chat_template=chatml", "--max_new_tokens=8"]
        assert run_main(generate.main, chat) == 0
        answer = capsys.readouterr().out
        evaluated = [base, *more, f"--perplexity={texts}", "--seq_length=32", f"--output={tmp_path}/found"]
        assert run_main(evaluate.main, evaluated) == 0
        said.append((answer, json.loads((tmp_path / "found" / "results.json").read_text())["perplexity"]["loss"]))
    assert said[0][0] != said[1][0]
    assert said[1][1] < said[0][1]  # these are what it was trained on


def test_a_reward_model_of_pairs(data, base, tmp_path):
    """The fresh score learns beside the pairs; both stand in the adapter's folder, and in the merged classifier."""
    path = data[0].replace("texts.jsonl", "pairs.jsonl")
    words = (*data, path, "--objective=reward", TEXT[0], base, *LORA, *FULL, "--total_steps=3")
    made = train(tmp_path, *words, name="reward")
    assert "score" in stored(made) and "unembed" not in stored(made)
    settings = json.loads((made / "adapter" / "adapter_config.json").read_text())
    assert (settings["task_type"], settings["modules_to_save"]) == ("SEQ_CLS", ["score"])
    spec = base.partition("=")[2]
    to_huggingface(spec, tmp_path / "hf", dtype="fp32", adapter=made / "adapter")
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert settings["architectures"] == ["LlamaForSequenceClassification"] and settings["pad_token_id"] == 256
    token = np.arange(2, 34, dtype=np.int32)[None]
    beside, merged = (
        logits(*load_model(name, (1, 1, 1, 1), adapter=adapter), token)
        for name, adapter in ((spec, made / "adapter"), (f"huggingface::{tmp_path}/hf", None))
    )
    np.testing.assert_allclose(merged, beside, atol=1e-5 * np.abs(beside).max())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--lora.rank=4", "--lora.target_modules=q_proj,lm_head"), "lm_head can have no pair"),
        (("--lora.rank=4", "--lora.target_modules=q_prj"), "did you mean q_proj"),
        (("--lora.rank=4", "--lora.target_modules=model.layers.0.*"), "tells layer 0 from layer 1"),
        (("--lora.rank=4", "--lora.target_modules=model.layers.["), "is no pattern"),
        (("--lora.rank=4", "--lora.target_modules=.*nothing.*"), "names no module"),
        (("--lora.rank=4", "--lora.dropout=0.1"), "--lora.dropout=0.1"),
        (("--lora.alpha=4",), "--lora.rank=0 gives none"),
        (("--lora.rank=4", "--lora.rank_pattern=dict(q_proj=1.5)"), "is no rank"),
        (("--lora.rank=4", "--lora.alpha_pattern=dict(q_proj=-1)"), "a number above 0"),
        (("--lora.rank=4", "--llama.num_experts=4"), "does not go with experts"),
        (("--lora.rank=4", "--lora.base_dtype=nf4"), "--llama.hidden_size=32, which is no multiple of that"),
        (("--lora.rank=4", "--lora.double_quantization"), "--lora.base_dtype=fp32 has none: --lora.base_dtype=nf4"),
        (
            ("--lora.rank=4", "--lora.base_dtype=int8", WIDE.replace("=64,i", "=128,i"), "--mesh_dim=1,2,1,2", RING),
            "fsdp*sp=2*2 of --mesh_dim would cut: sp=1",
        ),
        (
            (
                *("--lora.rank=4", "--lora.base_dtype=nf4", "--lora.double_quantization", WIDE),
                "--mesh_dim=1,1,4,1",
            ),
            "tp=4 of --mesh_dim would cut: tp=3, tp=6, or without it",
        ),
    ],
)
def test_what_cannot_be_is_said(flags, message):
    with pytest.raises(UserError) as error:
        configured(*flags)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_long_names_of_dtypes_are_the_short_ones():
    assert configured("--lora.rank=4", "--lora.base_dtype=bfloat16").lora.base_dtype == "bf16"


def test_patterns():
    config = configured(
        "--lora.rank=4", r"--lora.target_modules=.*\.(q_proj|up_proj)", "--lora.rank_pattern=dict(up_proj=2)",
        "--lora.alpha_pattern={'.*q_proj': 16}", "--lora.rslora",
    )  # fmt: skip
    model = Model.of(config, make_mesh((1, 1, 1, 1)))
    assert [tuple(pair) for pair in model.pairs] == [("w_q", 4, 8.0), ("w_up", 2, 4 / 2**0.5)]


@pytest.fixture(scope="module")
def wide(data, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("wide")
    return f"params::{train(folder, *data, WIDE, *FULL, '--total_steps=2', name='base')}"


def test_a_base_in_4_bits_learns_goes_on_and_is_no_other(data, wide, tmp_path):
    """Bit by bit across a kill, and beside the codes that it began with; a base in 8 bits is another one."""
    words = (*data, WIDE, f"--load_checkpoint={wide}", *LORA[:2], *FULL, "--lora.double_quantization")
    one = train(tmp_path, *words, "--lora.base_dtype=nf4", "--total_steps=6", name="one")
    train(tmp_path, *words, "--lora.base_dtype=nf4", "--total_steps=3")
    train(tmp_path, *words, "--lora.base_dtype=nf4", "--total_steps=6", "--autoresume")
    assert losses(tmp_path / "run") == losses(one)
    assert losses(one)[6] < losses(one)[1]
    again = refusal(tmp_path, *words, "--lora.base_dtype=int8", "--total_steps=9", "--autoresume")
    assert "its weights are not those beside which the adapters of" in again


def test_the_same_codes_from_whatever_holds_the_weights(data, wide, tmp_path):
    """A checkpoint's, by way of the host's memory, and a folder's, layer by layer, on a mesh: those of the numbers."""
    to_huggingface(wide, tmp_path / "folder", dtype="fp32")
    to_ours(tmp_path / "folder", tmp_path / "ours")
    flags = (*data, WIDE, *LORA, "--lora.base_dtype=nf4", "--lora.double_quantization")
    config = configured(*flags, "--mesh_dim=1,1,2,1")
    layout = StateLayout(config, Model.of(config, make_mesh((1, 1, 2, 1))))
    wanted = part_of(layout.frozen_as_read, divide(layout.model.base.specs, layout.is_frozen)[1])
    _, plain = load_model(wide, (1, 1, 1, 1))
    for spec in (wide, f"huggingface::{tmp_path / 'folder'}", f"params::{tmp_path / 'ours'}"):
        found, _ = load_checkpoint(
            spec,
            {"params": Wanted(wanted, tables=layout.model.tables, quantised=layout.in_blocks)},
            config.architecture,
        )
        abstract = part_of(layout.abstract.frozen, wanted)
        assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), found["params"]) == jax.tree.map(
            lambda x: (x.shape, x.dtype, x.sharding), abstract
        )
        for name, (kept, dims) in layout.in_blocks.items():
            weight = name.removeprefix("layers.")
            want = quantise(plain["layers"][weight], kept, dims)
            jax.tree.map(np.testing.assert_array_equal, found["params"]["layers"][weight], want)


@pytest.mark.parametrize("dtype", ["nf4", "int8"])
def test_the_reference_is_the_base_in_blocks(data, wide, tmp_path, dtype):
    """DPO with a quantised base begins at ln 2 and learns; its column and its step say the same."""
    path = data[0].replace("texts.jsonl", "pairs.jsonl")
    found = []
    for how in ("columns", "step"):
        words = (
            *data, path, *PAIRED[:2], TEXT[0], WIDE, f"--load_checkpoint={wide}", *LORA, f"--reference={how}", *UNSAVED,
            "--total_steps=3", f"--lora.base_dtype={dtype}",
        )  # fmt: skip
        rows = read_rows(train(tmp_path, *words, name=how) / "metrics.jsonl")
        found.append([row["loss"] for row in rows])
    assert found[0][0] == pytest.approx(np.log(2), abs=1e-6) and found[0][2] < found[0][0]
    assert found[1] == pytest.approx(found[0], abs=1e-6)
