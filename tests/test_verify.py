"""The verifier finds nothing where nothing is wrong, and names the dimension of each of three planted faults."""

from dataclasses import replace
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest

from ringbpt import inspect, plan, verify
from ringbpt.attention.parallel import ring
from ringbpt.config import ALIASES, ENTRY_FLAGS, RUN_FLAGS, UserError, parse, parse_args, run_main, split_flags
from ringbpt.config.families import FAMILIES
from ringbpt.layouts import LAYOUTS
from ringbpt.model import llama

FLAGS = [
    "--config=tests/recipe.py",
    "--train_dataset.python_dataset.seq_length=64",
    "--train_dataset.python_dataset.batch_size=4",
    "--eval_steps=0",
    "--llama.num_hidden_layers=1",
    "--llama.intermediate_size=64",
    "--llama.scan_mlp=False",  # less to compile, several times a test
    "--llama.remat_block=",
    "--mesh_dim=1,1,1,2",
]


@pytest.fixture(params=[()])
def config(tmp_path, monkeypatch, request):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(40):  # documents of which several share a row
        (folder / f"{i}.py").write_text(f"# {i}\n" + "pass\n" * (1 + i % 5))
    monkeypatch.setenv("RINGBPT_CACHE", str(tmp_path / "cache"))
    flags = [*FLAGS, f"--train_dataset.python_dataset.path={folder}", "--train_dataset.python_dataset.split=all"]
    flags += request.param
    config = parse(parse_args(flags), device_count=2)
    given = verify.Variant(config.mesh_shape, config.execution, config.optimizer.accumulate_gradient_steps)
    some = [given, given.but(sp=1), given.but(sequence_parallel="all_gather"), given.but(packing="alone")]
    monkeypatch.setattr(verify, "variants", lambda config, device_count: some)
    return config


def run(config):
    return verify.verify(config, 2, 1e-5, say=lambda line: None)


def test_nothing_parts(config):
    report = run(config)
    assert report["ok"] and report["parting"] == []
    assert [row["worst"] < 2e-6 for row in report["rows"]] == [True] * 4


QLORA = ("--lora.rank=4", "--lora.base_dtype=nf4", "--llama.hidden_size=128", "--lora.double_quantization")


@pytest.mark.parametrize("config", [QLORA], indirect=True)
def test_nothing_parts_of_adapters_beside_a_base_in_4_bits(config):
    report = run(config)
    assert report["ok"] and all(row["worst"] < 1e-5 for row in report["rows"])
    compared = report["rows"][0]["differences"]
    assert "attention" in compared and "norms" not in compared and "embedding" not in compared


@pytest.mark.parametrize("config", [("--llama.num_experts=4", "--llama.num_experts_per_tok=2")], indirect=True)
def test_nothing_parts_of_experts_in_micro_batches(config, monkeypatch):
    """Their balance, where it is no part of the loss, is one line of each micro-batch's rows, and is not compared."""
    given = verify.Variant(config.mesh_shape, config.execution, config.optimizer.accumulate_gradient_steps)
    halves = [given.but(sp=1), given.but(accumulate_gradient_steps=2)]
    monkeypatch.setattr(verify, "variants", lambda config, device_count: halves)
    report = run(config)
    assert report["ok"] and [row["worst"] < 2e-6 for row in report["rows"]] == [True] * 2, report["rows"]


def test_the_first_batch_that_takes_loss_is_compared():
    batches = [np.zeros((2, 4)), np.zeros((2, 4)), np.eye(2, 4)]
    loader = SimpleNamespace(
        steps_per_epoch=3, batch_size=2, rows=lambda step, *_: SimpleNamespace(weight_BT=batches[step])
    )
    assert verify.first_batch(loader).weight_BT.any()
    with pytest.raises(UserError, match="nothing to compare"):
        verify.first_batch(SimpleNamespace(**vars(loader) | {"steps_per_epoch": 2}))


@pytest.mark.slow
def test_a_hop_that_never_arrives(config, monkeypatch):
    monkeypatch.setattr(ring, "_send", lambda x, axis, size, step=1: x)
    report = run(config)
    assert [row["ok"] for row in report["rows"]] == [False, True, True, False]
    assert report["parting"] == ["sp, sequence_parallel: 2 ring"]


def corrupt(monkeypatch, change):
    """Every batch goes to the devices changed: change(host batch, sp) -> host batch."""
    put_batch = llama.put_batch

    def put(rows, shape_BT, mesh, layout, window):
        return put_batch(lambda a, b: change(rows(a, b), mesh.shape["sp"]), shape_BT, mesh, layout, window)

    monkeypatch.setattr(llama, "put_batch", put)


@pytest.mark.slow
def test_labels_shifted_in_each_shard(config, monkeypatch):
    def shifted_in_shards(batch, sp):
        target = batch.target_BT.reshape(len(batch.target_BT), sp, -1).copy()
        if sp > 1:
            target[:, :, -1] = 0  # the last label of each shard is lost
        return replace(batch, target_BT=target.reshape(batch.target_BT.shape))

    corrupt(monkeypatch, shifted_in_shards)
    report = run(config)
    assert not report["ok"]
    # Alone in its row, no document is long enough to reach a shard's end.
    assert report["parting"] == ["sp, packing: 2 as given"]


def test_a_document_boundary_ignored(config, monkeypatch):
    corrupt(monkeypatch, lambda batch, sp: replace(batch, segment_BT=np.minimum(batch.segment_BT, 1)))
    report = run(config)
    assert not report["ok"]
    assert report["parting"] == ["packing: alone"]


def test_the_debug_recipe_has_enough_variants():
    config = parse(parse_args(["--config=configs/debug.py"]), device_count=8)
    found = verify.variants(config, 8)
    assert len(found) >= 24
    assert {variant.execution.sequence_layout for variant in found} == {*LAYOUTS}
    assert {variant.execution.sequence_parallel for variant in found} >= {
        "ring",
        "all_gather",
        "ulysses",
        "ulysses_ring",
    }


def test_alone_keeps_every_token_and_its_target():
    from ringbpt.types import Batch

    segment = np.array([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]], np.int32)
    token = np.arange(12, dtype=np.int32).reshape(2, 6)
    batch = Batch(token, token + 1, (segment > 0).astype(np.float32), token % 3, segment)
    split = verify.repacked(batch, "alone", 4)
    assert split.segment_BT.tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0] * 6]
    assert split.token_BT[1].tolist() == [2, 3, 4, 0, 0, 0]
    for name in ("token_BT", "target_BT", "weight_BT", "position_BT"):
        old, new = getattr(batch, name)[segment > 0], getattr(split, name)[split.segment_BT > 0]
        assert old.tolist() == new.tolist()  # rows and documents keep their order


def test_a_batch_of_fewer_rows_than_shards_is_filled_up():
    from ringbpt.types import Batch

    token = np.arange(12, dtype=np.int32).reshape(2, 6)
    batch = Batch(token, token + 1, np.ones((2, 6), np.float32), token % 3, np.ones_like(token), {"label": token})
    filled = verify.filled_up(batch, 8)
    assert filled.token_BT.shape == (8, 6) and not filled.segment_BT[2:].any() and not filled.weight_BT[2:].any()
    for name, array in batch.by_name().items():
        assert filled.by_name()[name][:2].tolist() == array.tolist()


def test_every_weight_of_every_family_is_compared():
    compared = set(chain(*verify.GROUPS.values()))
    rows = {row.ours.rpartition(".")[2] for family in FAMILIES.values() for row in family.rows}
    assert rows and rows <= compared, rows - compared


def test_a_report_that_could_not_be_written_is_refused_before_anything_runs(capsys):
    assert run_main(verify.main, [*FLAGS, "--json", "/nowhere/at/all.json"]) == 2
    said = "error: --json=/nowhere/at/all.json: there is no folder /nowhere/at: make it first\n"
    assert capsys.readouterr().err == said


def test_a_flag_of_its_own_with_a_slip_is_named(capsys):
    assert run_main(verify.main, [*FLAGS, "--tolerence=1e-5"]) == 2
    assert capsys.readouterr().err == "error: --tolerence is no flag: did you mean --tolerance?\n"


@pytest.mark.parametrize("entry", [verify, plan, inspect])
def test_no_flag_of_train_is_taken_for_one_of_an_entrys_own(entry):
    words = [f"--{name}=1" for name in (*RUN_FLAGS, *ALIASES, *ENTRY_FLAGS)]
    assert split_flags(words, entry.FLAGS)[1] == [word for word in words if word[2:-2] not in entry.FLAGS]


@pytest.mark.parametrize(
    "flags", [("ulysses_ring", "--llama.ulysses_degree=4"), ("all_gather", "--llama.heads_k_stride=4")], ids=str
)
def test_other_meshes_are_tried_with_every_strategy(flags):
    strategy, option = flags
    given = ["--config=configs/debug.py", "--llama.num_attention_heads=8", "--llama.num_key_value_heads=8"]
    config = parse(parse_args([*given, f"--llama.sequence_parallel={strategy}", option]), device_count=8)
    found = verify.variants(config, 8)
    elsewhere = [variant for variant in found if variant.mesh != config.mesh_shape]
    assert (found[0].mesh, found[0].execution) == (config.mesh_shape, config.execution)
    assert {variant.mesh.sp for variant in elsewhere} >= {2, 4} and len(elsewhere) >= 10
