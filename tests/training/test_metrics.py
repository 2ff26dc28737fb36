"""The rows on the disk, the terminal, the curve, and what a resumed run leaves of them."""

import io
import json
import math
import signal
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from ringbpt.config import Config, LoggerConfig, UserError
from ringbpt.objectives import OBJECTIVES
from ringbpt.objectives.objective import Objective
from ringbpt.training import metrics
from ringbpt.training.metrics import Clock, MetricsWriter, format_row, read_rows
from ringbpt.training.step import Metrics
from ringbpt.types import Mean
from tests.checkpoint.helpers import no_file_above
from tests.pictures import cut_off, drawn

CONFIG = Config(total_steps=1000)
ROW = {
    "step": 100,
    "loss": 2.3456,
    "accuracy": 0.5,
    "bits_per_byte": 3.25,
    "learning_rate": 1e-3,
    "gradient_norm": 0.7,
    "tokens_per_second": 12345.6,
    "step_seconds": 0.5,
}


def writer(path, config=CONFIG, is_main=True) -> MetricsWriter:
    return MetricsWriter(path, config, is_main)


def test_rows_are_appended_one_valid_json_object_a_line(tmp_path):
    metrics = writer(tmp_path)
    metrics.write(ROW)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == ROW  # on the disk before close
    metrics.write({"step": 100, "eval_loss": math.nan, "eval_accuracy": math.inf})
    metrics.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[1], parse_constant=pytest.fail) == {"step": 100, "eval_loss": None, "eval_accuracy": None}
    assert len(lines) == 2


def test_a_resumed_run_drops_the_rows_it_will_repeat_and_a_line_cut_off_by_a_kill(tmp_path):
    first = writer(tmp_path)
    for step in (10, 20, 30):
        first.write({"step": step, "loss": float(step)})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 40, "lo')
    second = writer(tmp_path)
    second.resume_from(20)
    second.write({"step": 30, "loss": -1.0})
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(10, 10.0), (20, 20.0), (30, -1.0)]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert [path.name for path in tmp_path.glob("metrics*")] == ["metrics.jsonl"]


def events_of(path: Path) -> list:
    from tensorboardX.proto.event_pb2 import Event

    data, events = path.read_bytes(), []
    while data:  # a record: its length in 8 bytes, 4 of checksum, the event, 4 of checksum
        size = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    return events


def test_tensorboard_gets_the_finite_values(tmp_path):
    for number in (1, 2):  # a run, and one that goes on after step 6: in the same second, and yet a file of its own
        metrics = writer(tmp_path)
        metrics.resume_from(6) if number == 2 else None
        metrics.write({"step": 7, "loss": 2.5 * number, "gradient_norm": math.nan})
        metrics.close()
    first, second = map(events_of, sorted((tmp_path / "tensorboard").iterdir()))
    scalars = [[(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value] for events in (first, second)]
    assert scalars == [[(7, "loss", 2.5)], [(7, "loss", 5.0)]]
    assert [(e.step, e.session_log.status) for e in second if e.HasField("session_log")] == [(7, 1)]  # START: purges
    assert all(e.wall_time for e in first + second)


KILLED = """
import os, signal, sys
from pathlib import Path
from ringbpt.config import Config
from ringbpt.training.metrics import MetricsWriter
writer = MetricsWriter(Path(sys.argv[1]), Config(), True)
for step in range(1, 26):
    writer.write({"step": step, "loss": 1.0 / step, "accuracy": 0.5})
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_that_is_killed_has_lost_no_row(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -signal.SIGKILL
    steps = list(range(1, 26))
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == steps
    [path] = (tmp_path / "tensorboard").iterdir()
    assert [e.step for e in events_of(path) for v in e.summary.value if v.tag == "loss"] == steps


# --- steps to rows ---


def step_metrics(**means: tuple[float, float]) -> Metrics:
    own = {"tokens": 64.0, "pairs": 100.0, "learning_rate": 0.1, "gradient_norm": 2.0}
    arrays = {name: Mean(np.float32(total), np.float32(weight)) for name, (total, weight) in means.items()}
    return Metrics(arrays, {name: np.float32(value) for name, value in own.items()})


def clock_of(log_freq: int, objective: Objective = OBJECTIVES["sft"], bytes_per_token: float = 2.0) -> Clock:
    return Clock(Config(log_freq=log_freq, total_steps=100), objective, bytes_per_token)


def test_a_row_is_the_mean_of_the_tokens_since_the_last_one():
    clock = clock_of(3)
    steps = [{"loss": (10.0, 10), "accuracy": (1.0, 10)}, {"loss": (90.0, 30), "accuracy": (30.0, 30)}]
    assert clock.tick(1, step_metrics(**steps[0])) is None
    clock.restart()  # a save: no step's time, but the steps' loss
    assert clock.tick(2, step_metrics(**steps[1])) is None
    row = clock.tick(3, step_metrics(loss=(8.0, 2), accuracy=(0.0, 2)))
    assert (row["loss"], row["loss_step"], row["accuracy"]) == (pytest.approx(108 / 42), 4.0, pytest.approx(31 / 42))
    assert row["bits_per_byte"] == pytest.approx(row["loss"] / math.log(2) / 2)
    assert (row["gradient_norm"], row["tokens"]) == (2.0, 64.0)  # of the step
    assert clock.tick(4, step_metrics(loss=(1.0, 1), accuracy=(1.0, 1))) is None
    clock.tick(5, step_metrics(loss=(1.0, 1), accuracy=(1.0, 1)))
    assert clock.tick(6, step_metrics(loss=(1.0, 2), accuracy=(1.0, 1)))["loss"] == 0.75  # nothing of the first three


def test_what_nothing_was_weighed_for_is_no_number():
    nothing = {"loss": (0.0, 0), "accuracy": (0.0, 0)}
    clock, names = clock_of(2), {"loss", "loss_step", "accuracy", "bits_per_byte"}
    clock.tick(1, step_metrics(**nothing))
    row = clock.tick(2, step_metrics(**nothing))
    assert not names & set(row) and row["gradient_norm"] == 2.0
    assert "loss" not in format_row(row) and "0.0000" not in format_row(row)
    clock.tick(3, step_metrics(loss=(6.0, 3), accuracy=(3.0, 3)))
    row = clock.tick(4, step_metrics(**nothing))
    assert (row["loss"], row["accuracy"]) == (2.0, 1.0) and "loss_step" not in row
    # No text behind what takes loss (special tokens alone): there is a loss, and no bits per byte.
    row = clock_of(1, bytes_per_token=math.inf).tick(1, step_metrics(loss=(6.0, 3), accuracy=(3.0, 3)))
    assert row["loss"] == 2.0 and "bits_per_byte" not in row


def test_a_loss_of_several_parts_is_the_sum_of_those_that_were_weighed():
    parts = Objective(lambda *_: {}, lambda config: {"nll": 1.0, "marks": -0.5}, ())
    row = clock_of(1, parts).tick(1, step_metrics(nll=(6.0, 3), marks=(0.0, 0), other=(1.0, 4)))
    assert (row["loss"], row["loss_step"], row["nll"], row["other"]) == (2.0, 2.0, 2.0, 0.25) and "marks" not in row
    row = clock_of(1, parts).tick(1, step_metrics(nll=(0.0, 0), marks=(0.0, 0), other=(1.0, 4)))
    assert row["other"] == 0.25 and not {"loss", "nll", "marks", "loss_step"} & set(row)
    assert math.isnan(clock_of(1, parts).tick(1, step_metrics(nll=(math.nan, 3), marks=(1.0, 1)))["loss"])


def test_only_the_main_process_writes_unless_all_workers_are_logged(tmp_path, capsys):
    silent = writer(tmp_path, is_main=False)
    silent.resume_from(0)
    silent.write(ROW)
    silent.progress(100, ROW)
    silent.close()
    assert list(tmp_path.iterdir()) == []
    worker = writer(tmp_path, Config(log_all_worker=True), is_main=False)
    worker.write(ROW)
    worker.progress(100, ROW)
    worker.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.worker0.jsonl", "tensorboard"]
    assert capsys.readouterr().out == ""


def test_plain_progress_lines_align_and_tell_the_time_left(tmp_path, capsys):
    metrics = writer(tmp_path)
    metrics.progress(5, ROW | {"loss": 11.5, "tokens_per_second": 987.0})
    metrics.progress(100, ROW)
    metrics.progress(100, {"step": 100, "eval_loss": 2.5, "eval_bits_per_byte": 3.6})
    first, second, held_out = capsys.readouterr().out.splitlines()
    assert first.startswith("step    5/1000  loss 11.5000 ") and second.startswith("step  100/1000  loss  2.3456 ")
    assert first.index("tokens/s") == second.index("tokens/s") and "12,346 tokens/s" in second
    assert second.endswith("ETA 0:07:30")  # 900 steps of half a second
    assert held_out.startswith("step  100/1000  loss  2.5000   3.600 bits/byte") and "held-out" in held_out


def test_progress_without_a_step_time_yet_and_with_a_nan(tmp_path, capsys):
    writer(tmp_path).progress(1, {"step": 1, "loss": math.nan})
    assert capsys.readouterr().out == "step    1/1000  loss     nan  ETA ?\n"
    assert format_row({"step": 1, "eval_loss": math.nan}) == "loss     nan"


def test_on_a_terminal_a_bar_moves_and_held_out_results_stay_above_it(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    metrics = writer(tmp_path)
    metrics.progress(100, ROW)
    metrics.progress(100, {"step": 100, "eval_loss": 2.5})
    metrics.progress(200, ROW | {"loss": 1.5})
    metrics.close()
    shown = terminal.getvalue()
    assert "200/1000" in shown and "1.5000" in shown and "12,346 tokens/s" in shown and "0:06:40" in shown
    assert "held-out" in shown


def test_loss_png_shows_the_whole_run_in_one_panel(tmp_path, monkeypatch):
    pictures, folder = drawn(monkeypatch), tmp_path / ("run-" * 40)
    folder.mkdir()
    first = writer(folder)
    first.write({"step": 1000, "loss": 8.0, "loss_step": 7.0, "bits_per_byte": 12.0})
    first.write({"step": 2000, "loss": 9.0, "loss_step": 9.0, "bits_per_byte": 13.5})
    second = writer(folder)
    second.resume_from(1000)
    second.write({"step": 2000, "loss": 3.0, "loss_step": 2.5, "bits_per_byte": 4.5})
    second.write({"step": 2000, "eval_loss": 3.5, "eval_bits_per_byte": 6.0})
    second.close()
    [(figure, path)] = pictures
    assert path == folder / "loss.png" and cut_off(figure) == []
    loss, bits = figure.axes
    assert loss.get_title().replace("\n", "") == folder.name
    curves = {line.get_label().split(" (")[0]: line.get_xydata().ravel().tolist() for line in loss.lines}
    assert curves == {
        "single steps": [1000, 7, 2000, 2.5], "training": [1000, 8, 2000, 3], "held-out": [2000, 3.5],
    }  # fmt: skip
    labels = [text.get_text() for text in loss.get_legend().get_texts()]
    assert "training (last: 3.000, 4.500 bits per byte)" in labels
    # The right axis is the left one in another unit, that of the training data: those held out have other bytes.
    assert bits.get_ylim() == pytest.approx(np.array(loss.get_ylim()) * 1.5)
    assert (bits.get_ylabel(), bits.get_yscale()) == ("bits per byte of the training data", loss.get_yscale())
    assert loss.get_yscale() == "log" and loss.get_xlabel() == "step"
    assert "1,500" in [label.get_text() for label in loss.get_xticklabels()]
    numbers = [label.get_text() for axis in (loss, bits) for label in axis.get_yticklabels()]
    assert numbers and all(float(number) > 0 for number in numbers)  # 3 and 2.5, and no 10^0


def test_a_curve_of_means_that_are_single_steps_is_drawn_once(tmp_path, monkeypatch):
    pictures, metrics = drawn(monkeypatch), writer(tmp_path)
    for step in (1, 2):
        metrics.write({"step": step, "loss": 2.0 + step / 10, "loss_step": 2.0 + step / 10})
    metrics.write({"step": 3, "gradient_norm": 0.0})  # nothing took loss
    metrics.close()
    [(figure, _)] = pictures
    [axis] = figure.axes  # and no bits per byte, where there are none
    assert [line.get_xydata().tolist() for line in axis.lines] == [[[1, 2.1], [2, 2.2]]]
    assert axis.get_yscale() == "linear"


def test_loss_png_is_a_picture_and_an_empty_run_draws_none(tmp_path):
    metrics = writer(tmp_path)
    metrics.close()
    assert not (tmp_path / "loss.png").exists()
    metrics.write({"step": 1, "loss": 2.0})
    metrics.close()
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


ONLINE = Config(logger=LoggerConfig(online=True, project_id="p", prefix="team", experiment_note="why"))


def test_online_without_wandb_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"--logger\.online.*ringbpt\[wandb\]"):
        writer(tmp_path, ONLINE)
    writer(tmp_path, ONLINE, is_main=False)  # the other processes don't log, and don't need it


def test_online_sends_each_row_to_wandb(tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, row, step):
            calls.append((step, row))

        def finish(self):
            calls.append("finish")

    wandb = types.SimpleNamespace(init=lambda **kwargs: calls.append(kwargs) or Run())
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    metrics = writer(tmp_path, ONLINE)
    metrics.write({"step": 3, "loss": 2.0})
    metrics.close()
    started, logged, finished = calls
    assert started["project"] == "team--p" and started["notes"] == "why" and started["config"]["total_steps"] == 10000
    assert (logged, finished) == ((3, {"loss": 2.0}), "finish")


def test_rows_that_find_no_room_are_written_later(tmp_path, capsys):
    late = writer(tmp_path)
    with no_file_above(20):
        late.write({"step": 1, "loss": 2.0})
        late.write({"step": 2, "loss": 1.5})
        assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    assert capsys.readouterr().out == f"{tmp_path / 'metrics.jsonl'}: File too large: rows are written later\n" * 2
    late.write({"step": 3, "loss": 1.0})
    late.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]


# --- where a run's time goes ---


def shares_of(clock: Clock) -> dict[str, float]:
    found = {name.removeprefix("goodput/"): share for name, share in clock.goodput().items()}
    assert set(found) == set(metrics.GOODPUT) and sum(found.values()) == pytest.approx(1)
    return found


def test_each_moment_of_a_run_belongs_to_one_part(monkeypatch, capsys):
    now, waits = [100.0], [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    def take() -> float:
        seconds, waits[0] = waits[0], 0.0
        return seconds

    clock = Clock(Config(log_freq=2, total_steps=4), OBJECTIVES["sft"], 2.0, take, began=90.0)
    with clock.spending("steps"):
        passes(4), waits.__setitem__(0, 1.0)
        clock.spend("compile", passes, 5)
        passes(2)
        clock.tick(1, step_metrics(loss=(1.0, 1), accuracy=(1.0, 1)))
        passes(3), waits.__setitem__(0, 2.0)
        row = clock.tick(2, step_metrics(loss=(1.0, 1), accuracy=(1.0, 1)))
        assert row["data_wait"] == pytest.approx(2 / 3)
        assert row["goodput/steps"] == pytest.approx(6 / 24) and row["goodput/other"] == pytest.approx(10 / 24)
        with clock.spending("eval"):
            passes(1)
            clock.spend("save", passes, 2)  # within something else
            passes(1)
        with pytest.raises(KeyError), clock.spending("save"):
            passes(1)
            raise KeyError
    with clock.closing("save", io.StringIO()):
        passes(4)  # not the closing
    wanted = {"steps": 6, "data": 3, "save": 3, "compile": 5, "eval": 2, "other": 14}
    assert shares_of(clock) == pytest.approx({name: seconds / 33 for name, seconds in wanted.items()})
    clock.close()
    assert "goodput steps 18.2%, data 9.1%, save 9.1%, compile 15.2%, eval 6.1%, other 42.4% of 0:00:33" in (
        capsys.readouterr().out
    )


def test_a_run_without_a_step_has_no_goodput(capsys):
    clock_of(1).close()
    assert capsys.readouterr().out == ""
