"""A run's own metrics file beside the plan of its flags."""

import json

import pytest

from ringbpt import plan as entry
from ringbpt.config import UserError
from ringbpt.planning import report as reports
from ringbpt.planning.check import check, checked, read_run, typical
from ringbpt.planning.estimate import step_flops, visible_pairs
from ringbpt.training import loop
from tests.planning.test_plan import SMALL, config_of

GIB = 2**30
PLAN = {
    "step_seconds": [1.0, 1.5],
    "tokens_per_second": [20_000.0, 30_000.0],
    "mfu": [0.4, 0.6],
    "bytes": {"total": 40 * GIB},
    "fits": True,
}


def row(step: int, **values) -> dict:
    usual = {"step_seconds": 1.2, "tokens_per_second": 27_000.0, "mfu": 0.5, "device_memory_bytes": 41 * GIB}
    return {"step": step, "loss": 2.0} | usual | values


def test_each_figure_is_inside_or_outside_and_by_how_much():
    """Steps as they mostly were: one that waited for data decides nothing."""
    found = check(PLAN, [row(2), row(3, step_seconds=9.0), row(4, mfu=0.3), row(5, mfu=0.3), row(6, mfu=0.3)])
    assert [each.inside for each in found] == [True, True, False, True]
    shown = checked(found, 5)
    assert "MFU" in shown and "outside, by 25%" in shown and shown.count("inside") == 3
    [*_, memory] = check(PLAN, [row(2, device_memory_bytes=43 * GIB)])
    assert memory.inside is False and (memory.low, memory.high) == (38, 42)


def test_what_a_run_does_not_say_is_not_judged():
    [*_, mfu, memory] = check(PLAN, [{"step": 2, "step_seconds": 1.2}])
    assert (mfu.inside, memory.verdict) == (None, "not measured")


def test_a_plan_without_a_bracket_is_refused():
    for fits, why in ((True, "whose speed nobody knows"), (False, "does not fit")):
        with pytest.raises(UserError, match=why):
            check(PLAN | {"step_seconds": None, "fits": fits}, [row(2)])


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": 1, "loss": 3.0}), json.dumps(row(2)), json.dumps(row(3, step_seconds=True)), '{"st']
    file.write_text("\n".join(lines))
    assert [each["step"] for each in read_run(file)] == [2]


def test_a_runs_own_file_is_read(tmp_path, monkeypatch):
    """Of two steps that were trained here; the pairs that its rows hold are what is planned with."""
    (tmp_path / "a.py").write_text("pass\n" * 4000)
    monkeypatch.setenv("RINGBPT_CACHE", str(tmp_path / "cache"))
    source = "--train_dataset.python_dataset"
    run = [f"{source}.path={tmp_path}", f"{source}.split=all", "--total_steps=3", "--log_freq=1", "--nosave_final"]
    config = config_of(*run, "--save_minutes=0", f"--logger.output_dir={tmp_path}", "--logger.experiment_id=r")
    loop.train(config)
    [file] = tmp_path.rglob("metrics.jsonl")
    rows = read_run(file)
    pairs = typical(rows, "visible_pairs")
    assert rows and pairs and 0 < pairs <= visible_pairs(config)
    assert step_flops(config, False, pairs).attention == pytest.approx(
        step_flops(config, False).attention * pairs / visible_pairs(config)
    )


def test_the_command_says_so_and_its_exit_code_too(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reports.Plan, "as_dict", lambda plan: PLAN | {"flops": {"pairs": plan.pairs}})
    monkeypatch.setattr(reports, "table", lambda report: "table")
    monkeypatch.setattr(reports, "make_plan", lambda config, machine: reports.Plan(config, machine, PROGRAM))
    file, out = tmp_path / "metrics.jsonl", tmp_path / "plan.json"
    for seconds, code in ((1.2, 0), (1.7, 1)):
        file.write_text(json.dumps(row(2, step_seconds=seconds, visible_pairs=1000)))
        assert entry.main([*SMALL, "--topology=8xh200", f"--check_run={file}", f"--json={out}"]) == code
        assert "seconds a step" in capsys.readouterr().out
        report = json.loads(out.read_text())
        assert report["run"][0]["inside"] is (code == 0) and report["flops"] == {"pairs": 1000}
    with pytest.raises(UserError, match="nobody knows the speed of cpu-8"):
        entry.main([*SMALL, "--topology=cpu-8", f"--check_run={file}"])


PROGRAM = reports.Program({"parameters": 400}, 2**20, 2**20 + 400, 0, [], "")
