"""What 656404e wrote (tests/golden/run.zip) is read by the code of today, which goes on with the same numbers."""

import importlib.util
import json
import sys
import zipfile
from pathlib import Path

import pytest

from ringbpt.config import parse, parse_args, run_main
from ringbpt.training import loop
from tests.golden.make_run import FILE, GOES_ON, ROOT, SCRIPTS, TRAIN, digest, losses


@pytest.fixture(scope="module")
def expected(compiled_once):
    """What is in expected.json; the cases share a compilation cache."""
    with zipfile.ZipFile(FILE) as archive:
        return json.loads(archive.read("expected.json"))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """The zip's files in the working directory, as whoever wrote them had them."""
    with zipfile.ZipFile(FILE) as archive:
        for name in archive.namelist():
            archive.extract(name, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Two ways in for every test run: a train state, and weights alone.
@pytest.mark.parametrize(
    "name",
    [n if n in ("full", "from_huggingface") else pytest.param(n, marks=pytest.mark.slow) for n in GOES_ON],
)
def test_an_old_run_goes_on_with_the_same_losses(name, folder, expected):
    words = {word.partition("=")[0]: word for word in (*TRAIN, f"--logger.experiment_id={name}", *GOES_ON[name])}
    loop.train(parse(parse_args(list(words.values())), 2))
    assert losses(folder / "runs" / name) == pytest.approx(expected["losses"][name], rel=2e-6, abs=0)
    assert len(expected["losses"][name]) == {"full": 8}.get(name, 2)


@pytest.mark.parametrize("name", SCRIPTS)
def test_old_weights_convert_to_the_same_tensors(name, folder, expected):
    script, *words = SCRIPTS[name]
    spec = importlib.util.spec_from_file_location(script, ROOT / "scripts" / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    output = next(word.partition("=")[2] for word in words if word.startswith("--output"))
    if (folder / output).exists():  # made by the old code too
        assert digest(folder / output) == expected["digests"][name]
        (folder / output).rename(folder / "old")
        words = [word.replace(f"={output}", "=new") for word in words]
        output = "new"
    assert run_main(module.main, words) == 0
    assert digest(folder / output) == expected["digests"][name]
    assert len(set(expected["digests"].values())) == 3 and "torch" not in sys.modules
