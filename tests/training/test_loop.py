"""Whole runs of a tiny model in this process: what they compile, what they leave, and how they go on.

The runs share a compilation cache, so that the same program is compiled once for the file; the losses and weights
that are compared bit by bit come from the same executable, as a resumed run's do.
"""

import argparse
import inspect
import itertools
import json
import math
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import einops
import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import optax
import pytest

from ringbpt.checkpoint.checkpointer import Checkpointer
from ringbpt.checkpoint.load import load_checkpoint
from ringbpt.checkpoint.original import ROWS
from ringbpt.checkpoint.store import Rule, Wanted
from ringbpt.checkpoint.tensors import flatten
from ringbpt.config import Config, UserError, parse, parse_args
from ringbpt.data.delivery import Delivery
from ringbpt.data.loader import Loader
from ringbpt.ending import PREEMPTED, Signals, Stopped
from ringbpt.mesh import make_mesh
from ringbpt.model.llama import Model
from ringbpt.training import loop
from ringbpt.training.metrics import GOODPUT, read_rows

TINY = (
    "--update_llama_config=dict(vocab_size=288,hidden_size=32,intermediate_size=64,num_hidden_layers=2,"
    "num_attention_heads=4,max_sequence_length=64)",
    *("--llama.attention_type=standard", "--llama.loss_chunk_size=64"),
    *("--dtype=fp32", "--mesh_dim=1,1,1,1", "--total_steps=3", "--log_freq=1", "--tokenizer.vocab_file=bytes"),
    *("--optimizer.adamw_optimizer.lr=0.01", "--optimizer.adamw_optimizer.lr_warmup_steps=2"),
    "--optimizer.adamw_optimizer.lr_decay_steps=100",
    *("--train_dataset.text_processor.fields=text", "--train_dataset.json_dataset.seq_length=64"),
    *("--eval_dataset.text_processor.fields=text", "--eval_dataset.json_dataset.seq_length=64", "--eval_batches=2"),
)
EVALUATED = ("--eval_steps=3",)
UNSAVED = ("--nosave_final", "--save_minutes=0")
FULL = ("--checkpointer.save_optimizer_state",)
STEPS = 7
pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[str, ...]:
    """Flags that name training and held-out text: two halves of a module's source, in documents of a few lines."""
    folder = tmp_path_factory.mktemp("data")
    lines = inspect.getsource(argparse).splitlines(keepends=True)
    documents = [{"text": "".join(lines[i : i + 20])} for i in range(0, len(lines), 20)]
    half = len(documents) // 2
    for name, part in (("train", documents[:half]), ("eval", documents[half:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in part))
    return (
        *(f"--{name}_dataset.json_dataset.path={folder / name}.jsonl" for name in ("train", "eval")),
        *(f"--{name}_dataset.cache_dir={folder / 'cache'}" for name in ("train", "eval")),
    )


def flags(*given: str) -> list[str]:
    """The flags of a tiny run, of which the last of each name counts."""
    return list({word.partition("=")[0]: word for word in (*TINY, *given)}.values())


def configured(*given: str) -> Config:
    words = flags(*given)
    mesh = next(word for word in words if word.startswith("--mesh_dim=")).partition("=")[2]
    return parse(parse_args(words), math.prod(int(size) for size in mesh.split(",")))


def train(folder: Path, *given: str, name: str = "run", signals: Signals | None = None) -> Path:
    config = configured(*given, f"--logger.output_dir={folder}", f"--logger.experiment_id={name}")
    run_dir = loop.train(config, signals)
    assert run_dir == folder / name
    return run_dir


def refusal(folder: Path, *given: str, name: str = "run") -> str:
    with pytest.raises(UserError) as error:
        train(folder, *given, name=name)
    assert error.value.code == 2
    assert "\n" not in str(error.value)
    return str(error.value)


def losses(run_dir: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in read_rows(run_dir / "metrics.jsonl") if "loss" in row}


def eval_losses(run_dir: Path) -> dict[int, float]:
    return {row["step"]: row["eval_loss"] for row in read_rows(run_dir / "metrics.jsonl") if "eval_loss" in row}


def steps_of(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def weights(run_dir: Path, step: int) -> dict[str, np.ndarray]:
    config = configured()
    model = Model.of(config, make_mesh((1, 1, 1, 1)))
    wanted = {
        "params": Wanted(model.abstract_params),
        **dict.fromkeys(("opt_state", "guard"), Wanted(rule=Rule.IGNORED)),
    }
    found = Checkpointer(run_dir / "checkpoints").restore(step, wanted)
    return {name: np.asarray(leaf) for name, leaf in flatten(found["params"]).items()}


class Compiled(list):
    """The names of the programs that XLA was given to compile, cached or not, in order."""

    def __call__(self, event: str, seconds: float, **details) -> None:
        if event.endswith("/backend_compile_duration"):
            self.append(details["fun_name"])


@pytest.fixture(scope="module")
def whole(compiled_once, tmp_path_factory, data):
    """A run of seven steps with evaluation, accumulation and every kind of save; and what it compiled."""
    compiled = Compiled()
    jax.monitoring.register_event_duration_secs_listener(compiled)
    saves = ("--save_model_freq=2", "--save_milestone_freq=3")
    run_dir = train(tmp_path_factory.mktemp("runs"), *data, *EVALUATED, *FULL, *saves, f"--total_steps={STEPS}")
    jax.monitoring.unregister_event_duration_listener(compiled)
    return run_dir, compiled


# ---------------------------------------------------------------------------------------------- one run


def test_each_program_is_compiled_once(whole):
    _, compiled = whole
    assert compiled.count("jit(step)") == 1
    assert compiled.count("jit(eval_step)") == 1


def test_the_runs_folder(whole):
    run_dir, _ = whole
    names = {"config.json", "metrics.jsonl", "tensorboard", "loss.png", "checkpoints", "lock"}
    assert {path.name for path in run_dir.iterdir()} == names
    assert (run_dir / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert any((run_dir / "tensorboard").iterdir())
    assert json.loads((run_dir / "config.json").read_text())["total_steps"] == STEPS


def test_milestones_stay_and_of_the_others_the_last_two(whole):
    # 0, 2 and 4 were rolling; 3 and 6 are milestones; 7 is the final save, asked for by no frequency.
    assert steps_of(whole[0]) == ["3", "4", "6", "7"]


def test_the_rows(whole):
    rows = read_rows(whole[0] / "metrics.jsonl")
    measured = {"step", "loss", "accuracy", "bits_per_byte", "learning_rate", "gradient_norm", "param_norm"}
    measured |= {"tokens", "visible_pairs", "loss_step"} | {f"goodput/{name}" for name in GOODPUT}
    speeds = {"tokens_per_second", "step_seconds", "data_wait"}
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == list(range(1, STEPS + 1))
    assert set(trained[0]) == measured  # the first step is the compile's, and no measure of speed
    assert set(trained[1]) == measured | speeds
    for row in trained:
        assert all(math.isfinite(value) for value in row.values())
        assert row["loss_step"] == row["loss"]  # one step a row
        assert row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2), rel=0.1)  # about a byte a token
    assert all(trained[-1][f"goodput/{name}"] > 0 for name in ("steps", "save", "compile", "eval", "other"))
    evaluated = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evaluated] == [0, 3, 6, 7]
    assert all(set(row) == {"step", "eval_loss", "eval_accuracy", "eval_bits_per_byte"} for row in evaluated)
    assert len(rows) == len(trained) + len(evaluated)
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"] - 0.1


def test_accumulation_is_one_program_and_the_same_losses(whole, tmp_path, data):
    compiled = Compiled()
    jax.monitoring.register_event_duration_secs_listener(compiled)
    run_dir = train(tmp_path, *data, "--optimizer.accumulate_gradient_steps=4", *UNSAVED)
    jax.monitoring.unregister_event_duration_listener(compiled)
    assert compiled.count("jit(step)") == 1
    assert list(losses(run_dir).values()) == pytest.approx(list(losses(whole[0]).values())[:3], abs=1e-5)
    assert not (run_dir / "checkpoints").exists()


@pytest.mark.parametrize(
    ("mesh", "more"),
    [
        ("1,8,1,1", ()),  # attention_type left at its default
        # And no mesh_dim inside the model's flags.
        pytest.param("1,2,1,2", ("--llama.attention_type=ring_blockwise",), marks=pytest.mark.slow),
    ],
)
def test_meshes_that_crashed_the_original_give_the_same_losses(whole, tmp_path, data, mesh, more):
    assert "--llama.mesh_dim" not in " ".join(flags(*more))
    run_dir = train(tmp_path, *data, f"--mesh_dim={mesh}", *more, *UNSAVED)
    assert list(losses(run_dir).values()) == pytest.approx(list(losses(whole[0]).values())[:3], abs=1e-5)


def test_sizes_that_do_not_divide_name_the_nearest():
    for mesh, fits in (("1,1,1,3", "sp=2 or sp=4"), ("1,3,1,1", "fsdp=2 or fsdp=4"), ("1,1,3,1", "tp=2 or tp=4")):
        with pytest.raises(UserError) as error:
            configured(f"--mesh_dim={mesh}", "--llama.attention_type=ring_blockwise")
        assert fits in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("optimizer", ["palm", "lion", "muon"])
def test_every_optimizer_takes_its_steps(whole, tmp_path, data, optimizer):
    run_dir = train(tmp_path, *data, f"--optimizer.type={optimizer}", *UNSAVED, *rates(optimizer))
    got = losses(run_dir)
    assert all(math.isfinite(loss) for loss in got.values()) and len(got) == 3
    assert got[1] == losses(whole[0])[1]  # the same weights and the same first batch
    assert got[3] < got[1]


def rates(optimizer: str) -> list[str]:
    group = f"--optimizer.{optimizer}_optimizer"
    schedule = [f"{group}.lr_warmup_steps=1", f"{group}.lr_decay_steps=100"]
    return {
        "palm": [f"{group}.lr=0.001", f"{group}.lr_warmup_steps=2"],
        "lion": [f"{group}.lr=0.001", *schedule],
        "muon": [f"{group}.lr=0.01", f"{group}.adam_lr=0.01", *schedule],
    }[optimizer]


# ---------------------------------------------------------------------------------------------- going on


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, data):
    """The same run, stopped after four steps and resumed; begun with --autoresume where there was nothing yet."""
    folder = tmp_path_factory.mktemp("resumed")
    same = (*data, *EVALUATED, *FULL, "--autoresume")
    run_dir = train(folder, *same, "--total_steps=4")
    with (run_dir / "metrics.jsonl").open("a") as file:  # as a run leaves it that was killed after its last save
        file.write('{"step": 5, "loss": 99.0}\n{"step": 6, "lo')
    compiled = Compiled()
    jax.monitoring.register_event_duration_secs_listener(compiled)
    train(folder, *same, f"--total_steps={STEPS}")
    jax.monitoring.unregister_event_duration_listener(compiled)
    return run_dir, compiled


def test_a_resumed_run_is_the_same_run_bit_for_bit(whole, resumed):
    (run_dir, _), (again, compiled) = whole, resumed
    assert losses(again) == losses(run_dir) and len(losses(again)) == STEPS
    assert [row["step"] for row in read_rows(again / "metrics.jsonl") if "loss" in row] == list(range(1, STEPS + 1))
    assert eval_losses(again)[STEPS] == eval_losses(run_dir)[STEPS]
    expected = weights(run_dir, STEPS)
    for name, leaf in weights(again, STEPS).items():
        np.testing.assert_array_equal(leaf, expected[name], err_msg=name)
    assert compiled.count("jit(step)") == 1


def test_what_cannot_be_resumed_is_refused_in_one_line(resumed, data):
    run_dir, _ = resumed
    before = (run_dir / "metrics.jsonl").read_bytes(), (run_dir / "config.json").read_bytes(), steps_of(run_dir)
    same = (*data, *EVALUATED, *FULL, f"--total_steps={STEPS + 1}")
    used = refusal(run_dir.parent, *same)
    assert used.startswith("--logger.experiment_id=run: ") and "--autoresume" in used
    batch = "--train_dataset.json_dataset.batch_size=4"
    for other in ("--train_dataset.shuffle", "--train_dataset.packing=first_fit", batch):
        message = refusal(run_dir.parent, *same, "--autoresume", other)
        assert message.startswith("--autoresume from ") and "trainstate_params::" in message
    past = refusal(run_dir.parent, *same, "--autoresume", f"--total_steps={STEPS}")
    assert f"--total_steps={STEPS + 1}" in past
    wider = TINY[0].replace("hidden_size=32", "hidden_size=64")
    shape = refusal(run_dir.parent, *same, "--autoresume", wider)
    assert "parameter" in shape and "(288, 32)" in shape and "(288, 64)" in shape
    assert before == (
        (run_dir / "metrics.jsonl").read_bytes(),
        (run_dir / "config.json").read_bytes(),
        steps_of(run_dir),
    )


def test_a_step_that_lacks_nothing_but_its_name_is_gone_on_from(whole, tmp_path, data, capsys):
    """A run killed between the last byte and the name: it neither begins before that step nor leaves rows out."""
    shutil.copytree(whole[0], tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "7").rename(tmp_path / "run" / "checkpoints" / "7.saving")
    train(tmp_path, *data, *FULL, "--autoresume", f"--total_steps={STEPS + 1}")
    assert ", from step 7" in capsys.readouterr().out
    assert list(losses(tmp_path / "run")) == list(range(1, STEPS + 2))


def test_resuming_from_weights_alone_says_that_the_optimizer_starts_anew(tmp_path, data, capsys):
    exact = ("--checkpointer.float_dtype=fp32", "--autoresume")
    run_dir = train(tmp_path, *data, *exact, "--total_steps=2")
    assert "starts anew" not in capsys.readouterr().out
    train(tmp_path, *data, *exact, "--total_steps=3")
    assert "no optimizer state was saved" in capsys.readouterr().out
    assert list(losses(run_dir)) == [1, 2, 3]


def test_without_a_name_autoresume_finds_its_run_again(tmp_path, data, capsys):
    """And without --autoresume each run has a folder of its own, named by the time."""
    named = (*data, f"--logger.output_dir={tmp_path}", "--total_steps=1")
    first = loop.train(configured(*named, "--autoresume"))
    assert first == tmp_path / "run"
    again = loop.train(configured(*named, "--autoresume", "--total_steps=2"))
    assert again == first and list(losses(first)) == [1, 2]
    timed = loop.train(configured(*named, "--nosave_final"))
    assert timed.name.endswith("-run") and timed != first
    out = capsys.readouterr().out.splitlines()
    assert any(line.startswith("rate   adamw, lr ") for line in out)
    assert out[-1] == f"done: {timed}" and any(line.split() == ["run", str(timed)] for line in out)


def test_a_row_that_a_stop_falls_into_is_the_same_row(whole, tmp_path, data):
    """Steps 4 to 6 are one row, and step 4's checkpoint, which is gone on from, has the sums of step 4."""
    given = (*data, *FULL, "--log_freq=3", "--total_steps=6", "--save_milestone_freq=4")
    rows, steps = read_rows(train(tmp_path, *given) / "metrics.jsonl"), losses(whole[0])
    assert [(row["step"], row["loss_step"]) for row in rows] == [(3, steps[3]), (6, steps[6])]
    assert rows[1]["loss"] == pytest.approx(np.mean([steps[step] for step in (4, 5, 6)]), rel=1e-2)
    assert rows[1]["loss"] != steps[6]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "6")
    again = read_rows(train(tmp_path, *given, "--autoresume") / "metrics.jsonl")
    means = ("step", "loss", "loss_step", "accuracy", "bits_per_byte", "gradient_norm")
    assert [[row[name] for name in means] for row in again] == [[row[name] for name in means] for row in rows]


def test_steps_without_loss_give_no_number_and_harm_nothing(whole, tmp_path, data, capsys):
    """Documents of ten rows, with loss in the last alone: none in the first and third batch of eight."""
    (tmp_path / "long.jsonl").write_text('{"prompt": "%s", "completion": "aaa"}\n' % ("q" * 600) * 8)
    names = ("train_dataset", "eval_dataset")
    long = [f"--{name}.json_dataset.path={tmp_path / 'long.jsonl'}" for name in names]
    long += [f"--{name}.packing=best_fit" for name in names] + [f"--{name}.text_processor.fields=" for name in names]
    run_dir = train(tmp_path, *data, *long, *EVALUATED, "--eval_batches=1", *FULL)
    out, rows = capsys.readouterr().out, read_rows(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]  # and no held-out row, for there is nothing to say
    learnt = {"loss", "loss_step", "accuracy", "bits_per_byte"}
    assert [learnt & set(row) for row in rows] == [set(), learnt, set()]
    assert rows[0]["gradient_norm"] == 0 and rows[1]["loss"] > 1
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert all(np.isfinite(leaf).all() for leaf in weights(run_dir, 3).values())
    assert "0.0000" not in out and " 0.000 bits" not in out and "held-out" not in out
    assert out.count("WARNING: nothing takes loss in 68 of 72 rows") == 2


# ---------------------------------------------------------------------------------------------- --load_checkpoint


# ---------------------------------------------------------------------------------------------- --load_checkpoint


def originals_file(run_dir: Path, path: Path) -> Path:
    """The run's last weights as flax.serialization writes the original's tree, our table read from right to left."""
    params, tree = weights(run_dir, STEPS), {}
    for ours, theirs, pattern in ROWS:
        left, right = pattern.split(" -> ")
        stacked = "L " if ours.startswith("layers.") else ""
        sizes = {"two": 2} if "two" in pattern else {"H": 8} if "H" in pattern else {}
        tensor = einops.rearrange(params[ours], f"{stacked}{right} -> {stacked}{left}", **sizes)
        tree["params", *theirs.replace("{L}", "scan_decoder").split("/")] = tensor
    path.write_bytes(flax.serialization.to_bytes(flax.traverse_util.unflatten_dict(tree)))
    return path


@pytest.mark.parametrize("prefix", ["params", "trainstate_params", "flax_params"])
def test_a_new_run_begins_with_the_weights_it_is_given(whole, tmp_path, data, prefix):
    run_dir, _ = whole
    path = originals_file(run_dir, tmp_path / "original.msgpack") if prefix == "flax_params" else run_dir
    began = train(tmp_path, *data, *EVALUATED, "--total_steps=1", *UNSAVED, f"--load_checkpoint={prefix}::{path}")
    assert eval_losses(began)[0] == eval_losses(run_dir)[STEPS]
    assert eval_losses(run_dir)[0] != eval_losses(run_dir)[STEPS]
    assert list(losses(began)) == [1]


def test_a_train_state_goes_on_where_it_was_saved(whole, tmp_path, data):
    run_dir, _ = whole
    milestone = f"--load_checkpoint=trainstate::{run_dir}/checkpoints/3"
    went_on = train(tmp_path, *data, milestone, "--total_steps=5", *FULL)
    assert losses(went_on) == {step: losses(run_dir)[step] for step in (4, 5)}
    # The place in the data goes with it: resumed once more, it is still the same run.
    train(tmp_path, *data, milestone, "--total_steps=6", *FULL, "--autoresume")
    assert losses(went_on) == {step: losses(run_dir)[step] for step in (4, 5, 6)}


def test_the_place_in_the_data_alone(whole, tmp_path, data):
    """The weights of one step and the data of the next: a loss that the source run has never seen but could have."""
    run_dir, _ = whole
    params = f"--load_checkpoint=params::{run_dir}/checkpoints/3"
    place = f"--load_dataset_state={run_dir}/checkpoints/3"
    began = train(tmp_path, *data, params, place, "--total_steps=1", *UNSAVED)
    assert losses(began)[1] == losses(run_dir)[4]


def test_a_checkpoint_that_is_not_there_is_refused_before_any_data_is_read(tmp_path, data, monkeypatch):
    monkeypatch.setattr(loop, "make_loader", lambda *args, **named: pytest.fail("read the data first"))
    message = refusal(tmp_path, *data, f"--load_checkpoint=params::{tmp_path}/nothing")
    assert message == f"--load_checkpoint=params::{tmp_path}/nothing: no such file or folder"
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- stopped


def test_a_stopped_run_leaves_its_curve_and_its_last_step(whole, tmp_path, data, monkeypatch):
    rows, calls, signals = Loader.rows, itertools.count(), Signals()

    def interrupted(*args):
        if next(calls) == 5:
            signals.note(signal.SIGTERM, 0.0)
        return rows(*args)

    monkeypatch.setattr(Loader, "rows", interrupted)
    given = (*data, f"--total_steps={STEPS}", "--save_model_freq=2", "--autoresume")
    with pytest.raises(Stopped) as stop:
        train(tmp_path, *given, signals=signals)
    assert (stop.value.code, stop.value.experiment_id) == (PREEMPTED, "run")
    run_dir = tmp_path / "run"
    done = max(losses(run_dir))
    assert str(stop.value) == f"saved step {done}"
    assert (run_dir / "loss.png").exists() and 2 <= done < STEPS
    assert steps_of(run_dir)[-1] == str(done)
    # It has the optimizer's state, though no flag asked for it: the run goes on as if nothing had been.
    monkeypatch.undo()
    train(tmp_path, *given)
    assert losses(run_dir) == losses(whole[0])


def test_what_saves_by_time_and_what_it_saves(tmp_path, data, monkeypatch):
    saved = []
    save = Checkpointer.save
    spy = lambda self, step, entries, milestone: (
        saved.append((step, set(entries))) or save(self, step, entries, milestone)
    )
    monkeypatch.setattr(Checkpointer, "save", spy)
    run_dir = train(tmp_path, *data, "--save_minutes=1e-9")
    whole_state = {"params", "opt_state", "guard", "meta"}
    assert saved == [*((step, whole_state) for step in range(3)), (3, {"params", "meta"})]
    assert steps_of(run_dir) == ["2", "3"]
    times = lambda *given: (configured(*given).save_minutes, configured(*given).save_model_freq)
    assert times() == (10, 0) and times("--save_milestone_freq=1000") == (10, 0)
    assert times("--save_model_freq=0") == (0, 0) and times("--save_model_freq=5") == (0, 5)
    assert times("--save_minutes=0") == (0, 0) and times("--save_model_freq=5", "--save_minutes=3") == (3, 5)


def test_wandb_that_is_not_installed_is_said_before_anything_is_written(tmp_path, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "wandb is not installed" in refusal(tmp_path, *data, "--logger.online")
    assert list(tmp_path.iterdir()) == []


def test_load_checkpoint_is_read_onto_the_mesh(whole):
    """Nothing is restored whole on one device: each array comes back as its sharding says."""
    model = Model.of(configured("--mesh_dim=1,8,1,1"), make_mesh((1, 8, 1, 1)))
    wanted = {"params": Wanted(model.abstract_params)}
    params = load_checkpoint(f"params::{whole[0]}", wanted, model.architecture)[0]["params"]
    assert optax.tree.norm(params) == pytest.approx(read_rows(whole[0] / "metrics.jsonl")[-2]["param_norm"], rel=1e-5)
    assert len(params["embed"].sharding.device_set) == 8 and not params["embed"].sharding.is_fully_replicated


# ---------------------------------------------------------------------------------------------- time


def traced(run_dir: Path) -> list[int]:
    """The steps that the run's trace has."""
    [file] = (run_dir / "profile").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events if event.name == "train"]
    return sorted(int(dict(event.stats)["step_num"]) for event in events)


def test_a_trace_of_the_steps_that_were_asked_for_and_where_the_time_went(tmp_path, data, monkeypatch, capsys):
    rows_of, batch_of, asked = Loader.rows, Delivery.batch, threading.Semaphore(0)

    def asking(*arguments):
        asked.release()
        return batch_of(*arguments)

    def slow(*arguments):
        asked.acquire(timeout=5)  # none is laid up while a busy machine writes its trace
        time.sleep(0.4)
        return rows_of(*arguments)

    monkeypatch.setattr(Delivery, "batch", asking)
    monkeypatch.setattr(Loader, "rows", slow)
    run_dir = train(tmp_path, *data, *FULL, "--total_steps=5", "--save_minutes=0", "--profile=3,2")
    assert traced(run_dir) == [3, 4]
    trained = [row for row in read_rows(run_dir / "metrics.jsonl") if "loss" in row]
    shares = [{name: row[f"goodput/{name}"] for name in GOODPUT} for row in trained]
    assert all(sum(each.values()) == pytest.approx(1) and min(each.values()) >= 0 for each in shares)
    assert shares[-1]["data"] > 0.05  # 0.4 s a batch; 0.000 of a loader that is not slow
    assert shares[0]["compile"] > 0 == shares[-1]["eval"]
    assert max(row.get("data_wait", 0) for row in trained) > 0.5
    out = capsys.readouterr().out
    assert out.count("\ngoodput steps ") == 1 and out.count("the trace of --profile") == 1
    # Going on behind the first of them.
    train(tmp_path, *data, *FULL, "--total_steps=6", "--save_minutes=0", "--profile=3,4", "--autoresume")
    assert "--profile=3,4: the run goes on from step 5: nothing is traced" in capsys.readouterr().out
    assert traced(run_dir) == [3, 4]


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        ("3", "--profile=10,3"),
        ("0,2", "--profile=10,3"),
        ("2,0", "--profile=10,3"),
        ("2,3", "--total_steps=3 is below 4: --profile=2,2"),
        ("9,4", "--total_steps=3 is below 12: --profile=3,1"),
    ],
)
def test_steps_that_a_run_does_not_have_are_no_profile(profile, said):
    with pytest.raises(UserError, match=said):
        configured(f"--profile={profile}")
    assert configured("--profile=1,3").profile == "1,3"
