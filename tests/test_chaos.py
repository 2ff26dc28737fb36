"""The scoreboard of docs/reliability.md, played for a moment; the whole of it is hours: scripts/chaos.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def played(tmp_path: Path, *words: str) -> dict:
    command = [sys.executable, "scripts/chaos.py", *words, f"--json={tmp_path / 'score.json'}", f"--folder={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((tmp_path / "score.json").read_text())


def test_of_every_kind_of_damage_one(tmp_path):
    score = played(tmp_path, "--parts=damage", "--scale=0.003")
    assert score["damage"]["trials"] == 4 and score["damage"]["failures"] == []


@pytest.mark.slow
@pytest.mark.parametrize("part", ["kills", "damage", "nans", "signals", "peers"])  # a full disk has to be mounted
def test_a_part_in_small(tmp_path, part):
    score = played(tmp_path, f"--parts={part}", "--scale=0.03")
    assert score[part]["trials"] >= 1 and score[part]["failures"] == []


def test_a_mistyped_part_is_named(tmp_path):
    command = [sys.executable, "scripts/chaos.py", "--parts=kils"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: --parts=kils: 'kils' is none of kills, ")
