"""The rows on the disk, the terminal, the curve, and what a resumed run leaves of them."""

import io
import json
import math
import sys
import types

import pytest

from ringbpt.config import Config, LoggerConfig, UserError
from ringbpt.training.metrics import MetricsWriter, format_row, read_rows

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


def test_tensorboard_gets_the_finite_values(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    metrics = writer(tmp_path)
    metrics.write({"step": 7, "loss": 2.5, "gradient_norm": math.nan})
    metrics.close()
    [path] = (tmp_path / "tensorboard").iterdir()
    data, events = path.read_bytes(), []
    while data:  # a record: its length in 8 bytes, 4 of checksum, the event, 4 of checksum
        size = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    assert [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value] == [(7, "loss", 2.5)]


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


def test_loss_png_shows_both_curves_of_the_whole_run(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **kwargs: drawn.append((figure, path)))
    first = writer(tmp_path)
    first.write({"step": 10, "loss": 4.0, "bits_per_byte": 6.0})
    first.write({"step": 20, "loss": 9.0, "bits_per_byte": 9.0})
    second = writer(tmp_path)
    second.resume_from(10)
    second.write({"step": 20, "loss": 3.0, "bits_per_byte": 5.0})
    second.write({"step": 20, "eval_loss": 3.5, "eval_bits_per_byte": 5.5})
    second.close()
    [(figure, path)] = drawn
    assert path == tmp_path / "loss.png"
    lines = [[list(line.get_xydata().ravel()) for line in axis.lines] for axis in figure.axes]
    assert lines == [[[10, 4, 20, 3], [20, 3.5]], [[10, 6, 20, 5], [20, 5.5]]]
    assert all(axis.get_legend() and axis.get_ylabel() for axis in figure.axes)
    assert figure.axes[-1].get_xlabel() == "step"


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
