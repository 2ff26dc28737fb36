"""The first minutes with an accelerator, whole on a CPU; and what becomes of a part that fails, hangs or dies."""

import json
import os
import re
import subprocess
import sys
import time
import tomllib
from dataclasses import replace
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from ringbpt.bench import isolated, kernels, step
from ringbpt.bench.step import TINY, Part
from ringbpt.config import UserError

ROOT = Path(__file__).parents[2]


def test_the_whole_of_it_on_a_cpu(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "bench_step.py"), "--tiny", "--out=bench.json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["refused"] == {} and report["left_out"] == [] and report["versions"]["jax"]
    assert {row["kernel"] for row in report["kernels"]["tflops"]} == set(TINY.kernels)
    rows = report["steps"].values()
    assert [(row["tokens"], row["offload"]) for row in rows] == [(64, False), (128, True)]
    for row in rows:
        assert len(row["seconds"]) == 1 + step.TIMED and 5 < row["loss"] < 6 and row["kernel"] == "blockwise"
        assert row["tokens_per_second"] == row["tokens"] / row["step_seconds"]
        assert abs(row["planned_bytes"] / row["closed_form_bytes"] - 1) < 0.2
        assert (row["host_bytes"] > 0) == (sum(row["host_traffic"]) > 0) == row["offload"]
    assert report["debug"]["off_by"] < 1e-5 and len(report["debug"]["losses"]) == TINY.debug_steps
    assert report["decode"]["2x64"]["tokens_per_second"] > 0 and report["host"][str(1 << 20)]["to_host"] > 0
    table = (tmp_path / "bench.md").read_text()
    assert "| 128 | 2 | yes | blockwise |" in table and "off the stored losses" in table
    assert table.strip() in done.stdout


# --- parts that are nothing but what may happen to one; in other processes, so by name ---


def works(seconds, tell):
    tell({"value": 1.0})


def fails(seconds, tell):
    tell({"value": 2.0})
    raise ValueError("no such kernel\nand more of it")


def dies(seconds, tell):
    os._exit(7)


def hangs(seconds, tell):
    tell({"value": 3.0})
    time.sleep(600)


def test_what_fails_hangs_or_dies_ends_alone(monkeypatch):
    parts = [Part("host", each.__name__, each, 1.0) for each in (fails, dies, hangs, works)]
    monkeypatch.setattr(step, "parts", lambda asked: parts)
    monkeypatch.setattr(step, "START_S", 2.0)
    monkeypatch.setattr(isolated, "GRACE_S", 3.0)  # of the parent
    said, kept = [], []
    keep = lambda report: kept.append(json.dumps(report))
    report = step.run(TINY, 300.0, said.append, keep)
    assert report["host"] == {"fails": {"value": 2.0}, "hangs": {"value": 3.0}, "works": {"value": 1.0}}
    assert report["refused"]["host fails"] == "ValueError: no such kernel"
    assert report["refused"]["host dies"] == "its process ended by itself, with 7"
    assert "ended after" in report["refused"]["host hangs"] and set(report["refused"]) == {
        "host fails", "host dies", "host hangs",
    }  # fmt: skip
    assert [json.loads(each)["host"] for each in kept[:2]] == [{}, {"fails": {"value": 2.0}}]  # as it is made
    assert any("not measured: ValueError" in line for line in said)


def test_a_cpu_is_no_accelerator(monkeypatch):
    monkeypatch.setattr(step, "parts", lambda asked: [Part("host", "works", works, 1.0)])
    with pytest.raises(UserError, match="--tiny"):
        step.run(replace(TINY, cpu=False), 300.0, say=lambda line: None)


def test_what_there_is_no_time_for_is_listed(tmp_path):
    report = step.run(
        TINY, 0.0, lambda line: None, lambda report: kernels.save(report, tmp_path / "a.json", step.table)
    )
    assert len(report["left_out"]) == len(step.parts(TINY)) == 6 and report["steps"] == {}
    assert (tmp_path / "a.md").read_text().count("left out, for want of time") == 6


def test_what_a_step_takes_is_told_by_the_one_before():
    first, *_, last = [part for part in step.parts(step.DEFAULT) if part.section == "steps"]
    assert (first.name, last.name) == ("131072x2", "1048576x4")
    report = {"steps": {}}
    assert step.seconds_of(first, report) == step.seconds_of(last, report) == step.START_S + step.COMPILE_S
    report["steps"]["131072x2"] = {"executed_flops": 1.8e15, "step_seconds": 3.6, "compile_s": 20.0}
    assert 250 < step.seconds_of(last, report) < 500 and step.seconds_of(first, report) < 60
    # The plan for an H100, which the default is chosen by: 152 to 210 s a step with two layers, 297 to 408 with four.


def test_a_program_that_no_plan_can_read_is_measured_where_the_host_has_room(monkeypatch):
    def unreadable(compile, *_):
        compile({})
        raise ValueError("too many files")

    monkeypatch.setattr(step, "read_program", unreadable)
    monkeypatch.setattr(step.Plan, "as_dict", lambda plan: {}["flops"])
    rows = []
    tell = lambda row: rows.append(dict(row))
    step.measure_step(TINY, 128, 2, 100.0, tell)
    assert rows[-1]["loss"] > 5 and rows[-1]["planned_bytes"] > 1 << 20 and "KeyError" in rows[-1]["plan_failed"]
    monkeypatch.setattr(step, "host_memory", lambda: 1000)
    rows.clear()
    with pytest.raises(NotImplementedError, match="in the host's memory, where"):
        step.measure_step(TINY, 128, 2, 100.0, tell)
    [row] = rows  # what the plan says stands there
    assert row["host_bytes"] > 1000 and "step_seconds" not in row


def test_the_wheels_are_all_that_a_machine_with_jax_lacks():
    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    def needed(name: str, extras: frozenset[str]) -> None:
        if (normal(name), extras) in seen or normal(name) in there:
            return
        seen.add((normal(name), extras))
        for line in requires(name) or []:
            own = Requirement(line)
            environments = [{"python_version": "3.12", "extra": extra} for extra in ("", *extras)]
            if own.marker is None or any(map(own.marker.evaluate, environments)):
                needed(own.name, frozenset(own.extras))

    lines = (ROOT / "wheels_requirements.txt").read_text().splitlines()
    carried = {normal(re.fullmatch(r"([\w.-]+)==\S+( +# .+)?", line)[1]) for line in lines if not line.startswith("#")}
    there, seen = {"jax", "jaxlib", "numpy", "scipy", "ml-dtypes", "opt-einsum"}, set()
    for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]:
        needed(Requirement(line).name, frozenset(Requirement(line).extras))
    found = {name for name, _ in seen}
    assert found <= carried and "tensorstore" in found
    # Of other versions than are here, and for another Python.
    assert carried - found <= {"tzdata", "contourpy", "zipp"}
