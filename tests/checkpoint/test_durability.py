"""Nothing of a run is lost: damage is seen and named before it is read, and what was good before a failure stays."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from ringbpt.checkpoint.__main__ import main
from ringbpt.checkpoint.checkpointer import Checkpointer
from ringbpt.checkpoint.store import Entry, StoredStep, newest_step
from ringbpt.config import UserError, run_main
from tests.checkpoint.helpers import abstract, no_file_above, params_like, same, wanted


def save(directory, *steps, milestone=False, **options) -> Checkpointer:
    checkpointer = Checkpointer(directory, **options)
    for step in steps:
        checkpointer.save(step, {"params": Entry(params_like(seed=step)), "meta": {"place": step}}, milestone)
    checkpointer.wait()
    return checkpointer


def names(directory) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The checkpoints of steps 3 and 7; nobody writes into them."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    save(directory, 3, 7)
    return directory


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGES = {
    "a bit": flip,
    "the last bit": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 128])),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "gone": lambda path: path.unlink(),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "as empty": lambda path: path.write_bytes(b""),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A step with two trees of arrays, of which one need not be there."""
    directory = tmp_path_factory.mktemp("whole")
    checkpointer = Checkpointer(directory)
    entries = {"params": Entry(params_like()), "guard": Entry({"losses": jnp.zeros(3)})}
    checkpointer.save(7, entries, milestone=False)
    checkpointer.close()
    return directory


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_of_every_file_is_seen_and_named(whole, tmp_path, damage):
    files = [path.relative_to(whole / "7") for path in (whole / "7").rglob("*") if path.is_file()]
    assert len(files) > 10 and any(len(file.parts) > 2 for file in files)
    for number, file in enumerate(files):
        folder = tmp_path / str(number) / "checkpoints"
        shutil.copytree(whole / "7", folder / "7")
        DAMAGES[damage](folder / "7" / file)
        with pytest.raises(UserError) as error:
            StoredStep(folder / "7").verify()
        said = str(error.value)
        assert error.value.code == 4 and "\n" not in said
        assert str(file) in said, said
        shutil.rmtree(folder)


def test_a_file_that_nobody_wrote_and_a_step_that_the_folder_is_not(two, tmp_path):
    shutil.copytree(two / "7", tmp_path / "8")
    with pytest.raises(UserError, match="meta/metadata says step 7") as error:
        StoredStep(tmp_path / "8").verify()
    assert error.value.code == 4


def test_of_a_run_the_newest_good_step_is_taken_and_the_other_is_said(two, tmp_path, caplog):
    shutil.copytree(two, tmp_path / "checkpoints")
    data = max((tmp_path / "checkpoints" / "7" / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
    flip(data)
    caplog.set_level("INFO", "ringbpt")
    step = newest_step(tmp_path, "here")
    assert step.folder.name == "3"
    (line,) = caplog.messages
    assert data.name in line and "is damaged" in line and line.endswith(f"going on from {step.folder}")
    params = params_like(seed=3)
    same(step.restore(wanted(abstract(params)))["params"], params)
    flip(tmp_path / "checkpoints" / "3" / "meta" / "metadata")
    with pytest.raises(UserError, match=data.name) as error:  # the newest is what is said, where none is good
        newest_step(tmp_path, "here")
    assert error.value.code == 4


def test_a_save_that_fails_costs_nothing_and_the_next_may_do_better(tmp_path, caplog, capfd):
    caplog.set_level("INFO", "ringbpt")
    checkpointer = save(tmp_path, 1, keep=1)
    entries = {"params": Entry(params_like(seed=2))}
    with no_file_above(300):
        checkpointer.save(2, entries, milestone=False)
        with pytest.raises(UserError, match=f"^checkpoint {tmp_path}/2: ") as error:
            checkpointer.wait()
        checkpointer.poll()
        checkpointer.poll()
    # What Orbax's threads still wrote after it had failed is cleared when the next save begins.
    assert error.value.code == 4 and [name for name in names(tmp_path) if name.isdecimal()] == ["1"]
    (line,) = caplog.messages
    assert (
        line.startswith(f"checkpoint {tmp_path}/2: File too large")
        and line.endswith("not saved; the run goes on, and saves again when it is time")
        and "\n" not in line
    )
    assert "Traceback" not in capfd.readouterr().err
    StoredStep(tmp_path / "1").verify()
    checkpointer.save(2, entries, milestone=False)  # there is room again
    checkpointer.close()
    assert names(tmp_path) == ["2"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_is_no_number_is_not_saved(tmp_path, dtype):
    checkpointer = save(tmp_path, 1)
    bad = {"layers": {"w": jnp.ones(8, dtype).at[3].set(jnp.nan)}}
    checkpointer.save(2, {"params": Entry(bad)}, milestone=True)
    with pytest.raises(UserError, match=r"layers\.w is not finite") as error:
        checkpointer.wait()
    assert error.value.code == 3 and names(tmp_path) == ["1"]


def test_what_a_killed_process_leaves_is_cleared_or_finished(two, tmp_path):
    shutil.copytree(two / "3", tmp_path / "3")
    shutil.copytree(two / "3", tmp_path / "3.deleted")
    shutil.copytree(two / "7", tmp_path / "7.saving")  # whole but for its name
    shutil.copytree(two / "7", tmp_path / "8.saving")
    (tmp_path / "8.saving" / "digests.0-of-1").unlink()
    (tmp_path / "9.saving.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "9.saving.digests.0-of-1").write_text("killed while it was written")
    (tmp_path / "notes").mkdir()
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.latest_step() == 3
    checkpointer.clear()
    assert names(tmp_path) == ["3", "7", "notes"] and checkpointer.latest_step() == 7
    same(checkpointer.restore(7, wanted(abstract(params_like())))["params"], params_like(seed=7))


def test_a_left_over_name_ends_no_run(tmp_path):
    checkpointer = save(tmp_path, 1)
    (tmp_path / "1.deleted" / "params").mkdir(parents=True)
    (tmp_path / "3.deleted" / "params").mkdir(parents=True)
    save(tmp_path, 2, 3, 3, 4)
    checkpointer.save(4, {"params": Entry(params_like())}, milestone=True)  # again, and to be kept
    checkpointer.close()
    assert {"3", "4"} <= {*names(tmp_path)} and not {"1", "1.deleted", "2"} & {*names(tmp_path)}
    assert StoredStep(tmp_path / "4").objects == {"meta"}


def test_an_old_step_that_cannot_be_read_is_left_and_said(tmp_path, caplog):
    caplog.set_level("INFO", "ringbpt")
    save(tmp_path, 1, 2)
    (tmp_path / "1" / "meta" / "metadata").write_bytes(b"\xff{")
    save(tmp_path, 3, 4, keep=1)
    assert names(tmp_path) == ["1", "4"]
    (line,) = caplog.messages
    assert line.startswith(f"checkpoint {tmp_path}/1 cannot be read, and is left: ")


def test_weights_of_an_older_checkpoint_need_no_digests(two, tmp_path):
    shutil.copytree(two / "7", tmp_path / "7")
    (tmp_path / "7" / "digests.0-of-1").unlink()
    meta = tmp_path / "7" / "meta" / "metadata"
    with pytest.raises(UserError, match=r"digests.0-of-1: it is missing"):
        StoredStep(tmp_path / "7").verify()
    meta.write_text(json.dumps({"step": 7, "milestone": False}))  # as it was when there were none
    got = StoredStep(tmp_path / "7").read("params", "layers.w_q")
    np.testing.assert_array_equal(got, params_like(seed=7)["layers"]["w_q"])


def test_the_verb_lists_and_verifies(two, tmp_path, capsys):
    run = lambda *words: (run_main(main, list(words)), *capsys.readouterr())
    code, out, err = run("ls", str(two.parent))
    assert (code, err) == (0, "") and [line.split()[0] for line in out.splitlines()] == ["3", "7"]
    assert run("verify", str(two))[0] == 0 and "as it was written" in run("verify", str(two / "7"))[1]
    shutil.copytree(two, tmp_path / "checkpoints")
    flip(tmp_path / "checkpoints" / "3" / "params" / "_METADATA")
    (tmp_path / "checkpoints" / "7" / "meta" / "metadata").unlink()
    code, out, err = run("verify", str(tmp_path), "--json")
    assert code == 4 and err.splitlines()[-1].startswith("error: 2 of 2 checkpoints are damaged; ")
    problems = [step["problem"].split(": ")[1] for step in json.loads(out)]
    assert problems == ["params/_METADATA", "no whole checkpoint there"]
    for words, code, said in (
        (["vrify", str(two)], 2, "did you mean python -m ringbpt.checkpoint verify runs/<run>?"),
        (["ls"], 2, "did you mean python -m ringbpt.checkpoint ls runs/<run>?"),
        (["ls", str(tmp_path / "none")], 2, "no such folder"),
        (["ls", str(tmp_path / "checkpoints" / "3" / "params")], 4, "no checkpoints in this folder"),
    ):
        assert run(*words)[0] == code and said in run(*words)[2]
