"""`ringbpt <verb>`: the verbs, completion, JSON alone on standard output, names on the hub, scripts, and a wheel."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from io import BytesIO, TextIOWrapper
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import ringbpt
from ringbpt import evaluate, inspect, plan, verify
from ringbpt.__main__ import OF_A_RUN, VERBS, flags_of, main, make_parser
from ringbpt.config import JSON, UserError, json_to, model_folder, parse, parse_args, read_flags, run_main, say
from ringbpt.data.reading.hub import load_huggingface
from ringbpt.layouts import LAYOUTS
from ringbpt.training.metrics import check_wandb

ROOT = Path(__file__).parent.parent
ENTRIES = {
    path.parent.name if path.stem == "__main__" and path.parent.name != "ringbpt" else path.stem: path.read_text()
    for path in sorted((ROOT / "ringbpt").rglob("*.py"))
    if path.read_text().endswith("sys.exit(run_main(main))\n") or path.name == "__main__.py"
}


def python(*words: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path} | environment
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


# --- verbs ---


def test_the_verbs_are_the_entries():
    assert set(VERBS) == set(ENTRIES) - {"__main__"}
    assert set(OF_A_RUN) == {verb for verb in VERBS if "parse_args" in ENTRIES[verb]}


def test_without_a_verb_they_are_listed(capsys):
    assert main([]) == main(["--help"]) == 0
    listed = capsys.readouterr().out
    for verb, line in VERBS.items():
        assert re.search(rf"^  {verb} +{re.escape(line)}$", listed, re.MULTILINE)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ringbpt {ringbpt.__version__}\n"
    assert main(["train", "--help=optimizer"]) == 0
    assert "--optimizer.adamw_optimizer.lr" in capsys.readouterr().out


@pytest.mark.parametrize(("word", "verb"), [("trian", "train"), ("evalute", "evaluate"), ("Verfy", "verify")])
def test_a_verb_that_is_none(word, verb, capsys):
    assert run_main(main, [word, "--seed=1"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: '{word}' is no verb") and error.endswith(f"did you mean ringbpt {verb}?\n")


def test_python_m_ringbpt():
    done = python("-m", "ringbpt", "train", "--sead=1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --sead is no flag: did you mean --seed?\n"


# --- completion ---


def test_flags_and_choices_that_a_shell_may_complete():
    options = {name: action for action in make_parser(["train"])._actions for name in action.option_strings}
    assert set(options["--llama.sequence_layout"].choices) == {"auto", *LAYOUTS}
    assert options["--autoresume"].choices == ["True", "False"] and "--learning_rate" in options
    assert "topology" in flags_of("plan") and "seed" in flags_of("plan")
    assert "--topology" not in options and "seed" in flags_of("generate") and "total_steps" not in flags_of("generate")
    assert make_parser(["no such verb"])._actions[0].choices == VERBS


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("ringbpt tr", {"train "}),
        ("ringbpt train --llama.sequence_l", {"--llama.sequence_layout "}),
        ("ringbpt autotune --dtype=b", {"--dtype=bf16 "}),
    ],
)
def test_a_shell_is_answered_without_jax(tmp_path, line, found):
    pytest.importorskip("argcomplete")
    asked = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE": "1", "IFS": "\v", "COMP_TYPE": "9"}
    words = ["-X", "importtime", "-m", "ringbpt"]
    done = python(*words, **asked, _ARGCOMPLETE_STDOUT_FILENAME=str(tmp_path / "out"))
    assert set((tmp_path / "out").read_text().split("\v")) == found, done.stderr
    assert not re.search(r"\| +(jax|numpy)$", done.stderr, re.MULTILINE)


# --- JSON ---


def test_json_goes_to_a_file_or_stands_alone(tmp_path, capsys):
    flags = {"json": JSON, "depth": JSON}
    for words, where in (
        ([], ""), (["--json"], "-"), (["--json", "--depth=3"], "-"), (["--json=a b"], "a b"), (["--json", "x"], "x"),
        (["--json="], ""),
    ):  # fmt: skip
        assert read_flags(words, flags)["json"] == where
    for where, out in (("", "said\n"), (str(tmp_path / "x.json"), "said\n"), ("-", "{}\n")):
        with json_to(where) as write:
            print("said")
            write("{}\n")
        shown = capsys.readouterr()
        assert (shown.out, "said" in shown.err) == (out, where == "-")
    assert (tmp_path / "x.json").read_text() == "{}\n"
    with pytest.raises(UserError, match="Is a directory; give another name"), json_to(str(tmp_path)) as write:
        write("{}")


def test_plan_and_verify_print_json_alone(monkeypatch, capsys):
    """What is printed on the way is other people's business; the work itself is tested elsewhere."""
    from ringbpt.planning import report

    monkeypatch.setattr(report, "make_plan", lambda *_: SimpleNamespace(fits=True, as_dict=lambda: {"a": 1}))
    monkeypatch.setattr(report, "table", lambda report: "a table")
    assert run_main(plan.main, ["--topology=cpu-8", "--json"]) == 0
    assert (shown := capsys.readouterr()) and json.loads(shown.out) == {"a": 1} and "a table" in shown.err
    found = {"rows": [{"ok": True}], "parting": []}
    monkeypatch.setattr(verify, "verify", lambda *_: print("on the way") or found)
    assert run_main(verify.main, ["--json", "--mesh_dim=1,1,1,8"]) == 0
    assert (shown := capsys.readouterr()) and json.loads(shown.out) == found and "1 of 1 variants" in shown.err


def test_a_reader_that_has_had_enough_is_no_fault():
    code = "import sys\nfrom ringbpt.config import run_main\nsys.exit(run_main(lambda argv: print('line\\n' * 99999)))"
    command = f'{sys.executable} -c "{code}" | head -1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (141, "line\n", "")


def test_every_report_can_be_json():
    for entry in (plan, verify, inspect, evaluate):
        assert entry.FLAGS["json"] is JSON


# --- the Hugging Face hub, and Weights & Biases ---


def test_a_models_name_on_the_hub(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    from ringbpt.config import hub

    settings = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    settings |= {"num_attention_heads": 2, "vocab_size": 300, "max_position_embeddings": 128}
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "config.json").write_text(json.dumps(settings))
    asked = []

    def download(name, allow_patterns, local_files_only):
        asked.append((name, "model*.safetensors" in allow_patterns, local_files_only))
        if name.startswith("away/"):
            raise LocalEntryNotFoundError("a long story\nin many lines")
        if name.startswith("none/"):
            raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(hub, "stop_asking_where_none_answers", lambda: True)
    monkeypatch.chdir(tmp_path)
    tree = parse_args(["--load_checkpoint=huggingface::org/small"])
    assert (tree.llama.hidden_size, tree.tokenizer.vocab_file) == (64, str(tmp_path / "snapshot"))
    assert model_folder("org/small", "", weights=True) == model_folder("org/small", "", download=False)
    assert asked == [("org/small", False, False), ("org/small", True, False), ("org/small", False, True)]
    assert model_folder("away/x", "", download=False) == Path("away/x")
    for name, message in (
        ("away/x", "the hub doesn't answer"), ("none/x", "no such model on the hub"), ("/no/such", "no such folder"),
        ("a/b/c", "no such folder"), ("./a/b", "no such folder"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message) as caught:
            parse_args([f"--load_checkpoint=huggingface::{name}"])
        assert str(caught.value).startswith(f"--load_checkpoint=huggingface::{name}: ") and "\n" not in str(
            caught.value
        )
    (tmp_path / "org" / "small").mkdir(parents=True)
    assert model_folder("org/small", "") == Path("org/small")  # a folder comes first


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, capfd):
    """It was asked six times for each file, with a line or two each time."""
    import datasets
    import huggingface_hub.utils
    from huggingface_hub import constants

    tries = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)

    def head(*_, **__):
        tries.append(1)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.utils, "get_session", lambda: SimpleNamespace(head=head))
    flags = ["--load_llama_config=debug", "--train_dataset.type=huggingface"]
    config = parse(parse_args([*flags, "--train_dataset.huggingface_dataset.path=nobody/nothing"]), 8)
    assert config.train_dataset.huggingface_dataset.name == ""
    for _ in range(2):
        with pytest.raises(UserError, match=r"path='nobody/nothing'.* cannot be loaded: .*type=files reads a copy"):
            load_huggingface(config.train_dataset.huggingface_dataset, "train_dataset.huggingface_dataset")
    assert tries == [1] and capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("mode", "fault", "message"),
    [
        ("offline", "network", ""),
        ("online", "", ""),
        ("online", "network", "does not answer (<urlopen error no network>): WANDB_MODE=offline keeps the metrics"),
        ("online", "key", "no API key is configured: `wandb login`"),
        ("online", "package", 'pip install "ringbpt[wandb]"'),
    ],
)
def test_weights_and_biases_are_looked_at_first(monkeypatch, mode, fault, message):
    from urllib.error import URLError

    from ringbpt.training import metrics

    class UsageError(Exception):
        pass

    def raising(error):
        raise error

    module = ModuleType("wandb")
    module.setup = lambda: SimpleNamespace(settings=SimpleNamespace(mode=mode, base_url="https://wandb"))
    module.errors = SimpleNamespace(UsageError=UsageError)
    module.login = lambda: raising(UsageError("no key")) if fault == "key" else True
    monkeypatch.setitem(sys.modules, "wandb", None if fault == "package" else module)
    answer = URLError("no network") if fault == "network" else None
    monkeypatch.setattr(metrics, "urlopen", lambda *_, **__: raising(answer) if answer else BytesIO())
    if not message:
        check_wandb()
        return
    with pytest.raises(UserError) as caught:
        check_wandb()
    assert message in str(caught.value) and str(caught.value).startswith("--logger.online=True: ")


def test_weights_and_biases_come_before_the_data(monkeypatch, tmp_path, capsys):
    from ringbpt import train
    from ringbpt.training import loop

    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(loop, "make_tokenizer", lambda _: pytest.fail("the data were looked at first"))
    assert run_main(train.main, ["--logger.online", f"--logger.output_dir={tmp_path}/runs"]) == 2
    assert "wandb is not installed" in capsys.readouterr().err and not (tmp_path / "runs").exists()


# --- scripts ---


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.name)
def test_every_script_has_help(path, monkeypatch, capsys):
    for name in ("LIBTPU_INIT_ARGS", "JAX_PLATFORMS"):  # tpu_bundles.py writes both
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    shown = capsys.readouterr()
    assert not ended.value.code and shown.err == "" and "Traceback" not in shown.out
    for flag in set(
        re.findall(r'^    "(\w+)": Flag\(|add_argument\("--(\w+)"[^)]*help=(?!argparse)', path.read_text())
    ):
        assert any(f"--{name}" in shown.out for name in flag if name)


# --- a wheel ---


def test_a_wheel_carries_the_recipes(tmp_path):
    """Built from what the clone has, and read from an empty folder, with nothing of the clone at hand."""
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    for name in ("ringbpt", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "import setuptools.build_meta as backend; backend.build_wheel('../wheel')"
    (tmp_path / "wheel").mkdir()
    done = python("-c", build, folder=source)
    assert done.returncode == 0, done.stderr
    [wheel] = (tmp_path / "wheel").iterdir()
    shutil.unpack_archive(wheel, tmp_path / "unpacked", "zip")
    (tmp_path / "empty").mkdir()
    code = (
        "from ringbpt.config import HOME, parse, parse_args\n"
        "for argv in (['--mesh_dim=1,1,1,8'], ['--config=configs/debug.py'], ['--config=configs/passkey.py']):\n"
        "    tree = parse_args(argv)\n"
        "    parse(tree, tree.num_cpu_devices)\n"
        "    print(HOME, tree.llama.vocab_size)\n"
        "try:\n    parse_args(['--config=configs/no.py'])\nexcept Exception as error:\n    print(error)"
    )
    done = python("-c", code, folder=tmp_path / "empty", PYTHONPATH=str(tmp_path / "unpacked"))
    package = tmp_path / "unpacked" / "ringbpt"
    *recipes, refused = done.stdout.splitlines()
    assert recipes == [f"{package} {size}" for size in (288, 288, 264)], done.stderr
    assert "try --config=configs/debug.py" in refused
    assert "ringbpt = ringbpt.__main__:entry" in "".join(
        file.read_text() for file in (tmp_path / "unpacked").glob("*.dist-info/entry_points.txt")
    )


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("unread", ["closed", "full"])
def test_the_exit_code_is_the_same_where_nobody_reads_standard_error(unread, unbuffered):
    """What was left to be flushed failed once more as the process ended, and made 120 of any code."""
    reading, writing = os.pipe()
    os.close(reading)
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "wb") as full, os.fdopen(writing, "wb") as closed:
        command = [sys.executable, "-m", "ringbpt.plan", "--no_such=1"]
        error = closed if unread == "closed" else full
        assert subprocess.run(command, stderr=error, env=environment, timeout=60, check=False).returncode == 2


def test_a_line_that_the_terminals_encoding_lacks_is_said_all_the_same(monkeypatch):
    shown = TextIOWrapper(BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", shown)
    say("café \u2713 \udc80")
    assert shown.buffer.getvalue() == b"caf\xe9 \\u2713 \\udc80\n"


def test_a_machine_whose_memory_is_too_small_is_told_in_a_line(capfd):
    assert run_main(lambda argv: np.zeros(1 << 62, np.uint8).size, []) == 2
    assert capfd.readouterr().err.startswith("error: this machine's memory is too small: Unable to allocate 4.00 EiB")
