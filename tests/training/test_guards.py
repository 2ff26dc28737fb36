"""One step that is no number changes nothing and is told; too many end the run; a replica that differs is named."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ringbpt.checkpoint.store import StoredStep
from ringbpt.config import GuardConfig, UserError, parse, parse_args
from ringbpt.data.loader import Loader
from ringbpt.mesh import make_mesh
from ringbpt.model.llama import Model
from ringbpt.objectives import OBJECTIVES
from ringbpt.training import loop
from ringbpt.training.guards import Guard, Verdict, Watch, judge
from ringbpt.training.metrics import read_rows
from ringbpt.training.replicas import Replicas
from ringbpt.training.state import StateLayout
from ringbpt.training.step import make_train_step
from ringbpt.types import Batch
from tests.training.test_loop import configured, data, steps_of  # noqa: F401

FLAGS = [
    "--update_llama_config=dict(vocab_size=288,hidden_size=32,intermediate_size=32,num_hidden_layers=1,"
    "num_attention_heads=2,max_sequence_length=32,attention_type='standard',loss_chunk_size=32)",
    *("--tokenizer.vocab_file=bytes", "--train_dataset.text_processor.fields=text", "--dtype=fp32"),
    *("--train_dataset.json_dataset.path=x", "--train_dataset.json_dataset.seq_length=32"),
    *("--mesh_dim=1,1,1,1", "--total_steps=9", "--optimizer.adamw_optimizer.lr=0.01"),
    *("--optimizer.adamw_optimizer.lr_warmup_steps=3", "--optimizer.adamw_optimizer.lr_decay_steps=9"),
]
OFFLOADED = ("--optimizer.offload_state", "--optimizer.offload_params", "--llama.remat_block=nothing_saveable")


def batch_of(seed: int, weight: float = 1.0) -> Batch:
    token = np.random.default_rng(seed).integers(0, 256, (2, 33)).astype(np.int32)
    ones, place = np.ones((2, 32), np.int32), np.tile(np.arange(32, dtype=np.int32), (2, 1))
    return Batch(token[:, :-1], token[:, 1:], np.full((2, 32), weight, np.float32), place, ones)


@pytest.mark.parametrize(
    "more", [(), pytest.param(OFFLOADED, marks=pytest.mark.slow)], ids=["on the device", "on the host"]
)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_step_that_is_no_number_is_one_step_less(more, bad):
    config = parse(parse_args([*FLAGS, *more]), 1)
    layout = StateLayout(config, Model.of(config, make_mesh(config.mesh_shape)))
    step = make_train_step(layout, OBJECTIVES["sft"])

    def run(*weights: float):
        state, seen = layout.start(layout.model.init(jax.random.key(0))), []
        good = iter(range(9))
        for weight in weights:
            state, metrics = step(state, batch_of(next(good) if np.isfinite(weight) else 99, weight))
            seen.append(jax.device_get(metrics))
        return state, seen

    (with_bad, seen), (without, expected) = run(1, 1, bad, 1), run(1, 1, 1)
    jax.tree.map(np.testing.assert_array_equal, with_bad.trained, without.trained)
    jax.tree.map(np.testing.assert_array_equal, with_bad.opt_state, without.opt_state)
    assert [int(m.guard.skipped) for m in seen] == [0, 0, 1, 1] and int(seen[2].guard.in_a_row) == 1
    assert int(seen[3].guard.in_a_row) == 0 and int(with_bad.step) == int(without.step) + 1
    assert all(float(mean.weight) == float(mean.total) == 0 for mean in seen[2].means.values())
    assert float(seen[3].own["learning_rate"]) == float(expected[2].own["learning_rate"]) > 0
    assert float(seen[2].own["param_norm"]) == float(seen[1].own["param_norm"])


def test_a_spike_is_measured_by_good_steps_alone():
    config = GuardConfig(spike=4.0, window=10)
    guard, passed = Guard.new(config), []
    losses = [3.0 + 0.1 * (i % 3) for i in range(12)] + [30.0, 31.0, float("nan"), 29.0, 3.1, 3.5]
    for loss in losses:
        good, guard = judge(config, guard, jnp.float32(loss), jnp.float32(1))
        passed.append(bool(good))
    assert passed == [True] * 12 + [False] * 4 + [True, False]
    assert int(guard.skipped) == 5 and int(guard.count) == 13 and float(jnp.max(guard.losses)) < 3.3
    # Without a full window nothing is a spike, and with spike=0 nothing ever is.
    assert bool(judge(config, Guard.new(config), jnp.float32(1e9), jnp.float32(1))[0])
    assert bool(judge(replace(config, spike=0.0), guard, jnp.float32(1e9), jnp.float32(1))[0])
    assert not bool(judge(replace(config, spike=0.0), guard, jnp.float32(1), jnp.float32(jnp.inf))[0])


def test_what_was_skipped_is_said_and_too_many_in_a_row_end_the_run():
    said = []
    watch = Watch(GuardConfig(stop_after=3), said.append)
    verdict = lambda in_a_row: Verdict(np.float32(np.nan), np.float32(2.5), np.int32(in_a_row), np.int32(in_a_row))
    for in_a_row in (0, 1, 2):
        watch.look(10 + in_a_row, verdict(in_a_row))
    skipped = "step {}  loss nan, gradient norm 2.5: this update is skipped, {} so far"
    assert said == [skipped.format(11, 1), skipped.format(12, 2)]
    with pytest.raises(UserError, match=r"^step 13: loss nan, gradient norm 2\.5: 3 updates in a row") as error:
        watch.look(13, verdict(3))
    assert error.value.code == 3


def test_a_run_skips_says_goes_on_and_stops(data, tmp_path, monkeypatch, capsys):  # noqa: F811
    rows, broken = Loader.rows, {3, 6, 7, 8}

    def some_broken(self, step, *args):
        found = rows(self, step, *args)
        return replace(found, weight_BT=found.weight_BT * np.nan) if step in broken else found

    monkeypatch.setattr(Loader, "rows", some_broken)
    given = (*data, "--total_steps=20", "--guard.stop_after=3", "--save_model_freq=1", "--nosave_final")
    given += ("--checkpointer.keep=99", "--checkpointer.save_optimizer_state", f"--logger.output_dir={tmp_path}")
    with pytest.raises(UserError, match=r"^step 9: .* 3 updates in a row") as error:
        loop.train(configured(*given, "--logger.experiment_id=run"))
    assert error.value.code == 3
    found = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [(row["step"], row.get("skipped", 0)) for row in found] == list(enumerate((0, 0, 0, 1, 1, 1, 2, 3), 1))
    assert ["loss" in row for row in found] == [row["step"] not in (4, 7, 8) for row in found]
    assert capsys.readouterr().out.count("this update is skipped") == 3
    for step in steps_of(tmp_path / "run")[::4]:
        read = StoredStep(tmp_path / "run" / "checkpoints" / step)
        assert all(np.isfinite(read.read(entry, name)).all() for entry in read.trees for name in read.dtypes(entry))
    # What the guard has seen is in the checkpoint: the run goes on counting.
    monkeypatch.undo()
    shown = loop.train(configured(*given, "--logger.experiment_id=run", "--autoresume", "--total_steps=9"))
    assert read_rows(shown / "metrics.jsonl")[-1]["skipped"] == 3


MESH = (2, 1, 2, 2)
SPECS = {"table": P(("fsdp", "sp"), "tp"), "vector": P(), "heads": P(None, "tp")}


@pytest.mark.parametrize("name", SPECS)
def test_a_flipped_bit_of_one_replica_is_found_and_named(name):
    mesh = make_mesh(MESH)
    params = {
        key: jax.device_put(jnp.arange(64.0).reshape(8, 8), NamedSharding(mesh, spec)) for key, spec in SPECS.items()
    }
    replicas = Replicas(mesh, SPECS)
    replicas.check(replicas.send(params), 5)
    victim = mesh.devices[1, 0, 1, 0]
    parts = []
    for shard in params[name].addressable_shards:
        host = np.array(shard.data)
        if shard.device == victim:
            host.view(np.uint32)[1, 2] ^= 1 << 7
        parts.append(jax.device_put(host, shard.device))
    broken = {**params, name: jax.make_array_from_single_device_arrays((8, 8), params[name].sharding, parts)}
    with pytest.raises(UserError, match=f"^after step 5: {name} on device") as error:
        replicas.check(replicas.send(broken), 5)
    assert error.value.code == 3
    copies = {"table": 2, "vector": 8, "heads": 4}[name]  # of two nobody knows which is right
    named = f"{name} on device {victim.id} of process 0 is not what {copies - 1} other"
    assert copies == 2 or named in str(error.value)
