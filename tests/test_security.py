"""What others have written reaches neither the terminal as it is, nor files of this user's; no secret is kept."""

import json
import os
import stat
from types import SimpleNamespace

import pytest

from ringbpt import inspect
from ringbpt.config import (
    Config,
    DatasetConfig,
    FilesDatasetConfig,
    UserError,
    for_terminal,
    json_line,
    one_line,
    parse,
    parse_args,
    printable,
    run_main,
    to_dict,
)
from ringbpt.config.shown import without_secrets
from ringbpt.data.reading.files import cached, check_cache, default_cache
from ringbpt.data.stored import tokenise

NASTY = "a\x1b]0;t\x07\x9b31m\r\u202ez\u2066\x7f\udc80"


def is_plain(text: str) -> bool:
    return not {*text} & {*"\x1b\x07\x9b\r\u202e\u2066\x7f\udc80"}


def test_what_is_shown_has_no_character_that_a_terminal_obeys():
    assert printable(NASTY) == r"a\x1b]0;t\x07\x9b31m\r\u202ez\u2066\x7f\udc80"
    assert printable("ä ▁Ġ日本\n\t│⏎🙂") == "ä ▁Ġ日本\n\t│⏎🙂"
    assert one_line(ValueError(f"x\n{NASTY}\u2028y")) == f"x {printable(NASTY).replace(chr(92) + 'r', ' ')} y"
    assert (
        one_line(KeyError()) == "KeyError" and len(one_line("x" * 5000)) == 200 and one_line("a" * 300 + "z")[-1] == "z"
    )


def test_json_escapes_them_and_means_the_same():
    value = {"a": NASTY, "b": ["é\u2028", 1]}
    assert is_plain(json_line(value)) and json.loads(json_line(value)) == value and "é" in json_line(value)


def test_a_text_that_was_asked_for_is_changed_on_a_terminal_alone():
    terminal, pipe = (SimpleNamespace(isatty=lambda is_one=is_one: is_one) for is_one in (True, False))
    assert for_terminal(NASTY, terminal) == printable(NASTY) and for_terminal(NASTY, pipe) == NASTY


@pytest.mark.parametrize("more", [[], ["--json"], ["--train_dataset.on_bad_line=skip:9"]])
def test_documents_keys_and_names_of_files_reach_no_terminal(tmp_path, monkeypatch, capfd, more):
    """Not as tokens, nor in what is said of the data, its files and its bad lines."""
    monkeypatch.setenv("RINGBPT_CACHE", str(tmp_path / "cache"))
    name = tmp_path / f"n{NASTY.replace('/', '')}.jsonl"
    bad = '{"' + "\\u001b[2J" + '": 1}\n' if len(more) == 1 and "bad" in more[0] else ""
    # A tokenizer whose tokens are whole words, so that each would be printed as it is.
    words = {word: number for number, word in enumerate(["<unk>", *dict.fromkeys(NASTY.replace("\udc80", ""))])}
    model = {"type": "BPE", "vocab": words, "merges": [], "unk_token": "<unk>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    row = json.dumps({"text": NASTY.replace("\udc80", "")})
    name.write_text((row + "\n") * 40 + bad)
    flags = [
        "--load_llama_config=debug", "--llama.vocab_size=400", "--mesh_dim=1,1,1,-1", "--html=",
        f"--tokenizer.vocab_file={tmp_path}/tokenizer.json", f"--train_dataset.json_dataset.path={name}",
        "--train_dataset.json_dataset.seq_length=16", "--train_dataset.json_dataset.batch_size=2",
        "--train_dataset.text_processor.add_bos_token=False", "--train_dataset.text_processor.add_eos_token=False",
    ]  # fmt: skip
    assert run_main(inspect.main, [*flags, *more]) == 0
    out, err = capfd.readouterr()
    assert is_plain(out) and is_plain(err)
    if more == ["--json"]:
        assert f" {NASTY[1]}" in json.loads(out.splitlines()[0])["texts"]
    if bad:
        assert r"\x1b[2J" in out
    assert run_main(inspect.main, [*flags, "--train_dataset.text_processor.fields=other"]) == 2
    assert is_plain(err := capfd.readouterr().err) and r"\x1b]0;t\x07\x9b31m" in err


# --- the cache ---


def test_a_lock_follows_no_link_and_empties_no_file(tmp_path):
    precious, cache = tmp_path / "precious", tmp_path / "cache"
    precious.write_text("of mine")
    cache.mkdir(0o700)
    (cache / "x.lock").symlink_to(precious)
    with pytest.raises(UserError) as error:
        cached(cache, "x", lambda path: path.mkdir(), "train_dataset")
    assert error.value.code == 4 and precious.read_text() == "of mine" and not (cache / "x").exists()
    (cache / "x.lock").unlink()
    os.link(precious, cache / "x.lock")
    assert cached(cache, "x", lambda path: path.mkdir(), "train_dataset").is_dir()
    assert precious.read_text() == "of mine"
    work = cache / "work"
    work.mkdir()
    (work / "00000.lock").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic links"):
        tokenise._make_shard((None, None), work, 0, 0, 1, False)  # type: ignore[arg-type]
    assert precious.read_text() == "of mine"


def test_a_new_cache_is_for_this_user_alone(tmp_path):
    before = os.umask(0)
    try:
        made = cached(tmp_path / "a" / "b", "x", lambda path: path.mkdir(), "")
    finally:
        os.umask(before)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (made.parent, made.parent.parent, made.parent / "x.lock")]
    assert modes == [0o700, 0o700, 0o600]


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o722, 0o702])
def test_a_cache_that_others_can_write_is_refused(tmp_path, monkeypatch, mode):
    cache = tmp_path / "cache"
    cache.mkdir()
    cache.chmod(mode)
    monkeypatch.setenv("RINGBPT_CACHE", str(cache))
    with pytest.raises(UserError, match="can be written by others") as error:
        default_cache()
    assert error.value.code == 4 and not [*cache.iterdir()]
    cache.chmod(0o755)
    assert default_cache() == cache


def test_a_group_that_has_others_in_it_counts_and_another_users_cache_too(tmp_path, monkeypatch):
    def told(**status) -> None:
        mode, number = status.pop("mode"), status.pop("group", os.getegid())
        monkeypatch.setattr(os, "stat", lambda _: SimpleNamespace(st_mode=mode, st_gid=number, st_uid=status["user"]))

    user = 4242
    monkeypatch.setattr(os, "geteuid", lambda: user)
    groups = {7: SimpleNamespace(gr_name="me", gr_mem=[]), 8: SimpleNamespace(gr_name="staff", gr_mem=["me"])}
    monkeypatch.setattr("grp.getgrgid", groups.__getitem__)
    monkeypatch.setattr("pwd.getpwuid", lambda _: SimpleNamespace(pw_name="me", pw_gid=7))
    told(mode=0o40775, group=7, user=user)
    assert check_cache(tmp_path, "x") == tmp_path
    told(mode=0o40775, group=8, user=user)
    with pytest.raises(UserError, match=r"--x\.cache_dir=.*mode 775"):
        check_cache(tmp_path, "x")
    told(mode=0o40755, group=8, user=1)
    with pytest.raises(UserError, match="belongs to another user"):
        check_cache(tmp_path, "x")
    told(mode=0o40755, group=8, user=0)
    assert check_cache(tmp_path, "x") == tmp_path


# --- secrets ---


def test_secrets_are_neither_said_nor_kept(monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefgh123")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    text = "at https://me:pass%20word@host/x?y and s3://k:s@b with hf_abcdefgh123, 0123456789abcdef"
    clean = "at https://me:***@host/x?y and s3://k:***@b with ***, ***"
    assert without_secrets(text) == printable(text) == clean
    config = Config(train_dataset=DatasetConfig(files_dataset=FilesDatasetConfig(path="s3://k:geheim@b/x")))
    assert "geheim" not in json.dumps(to_dict(config)) and "s3://k:***@b/x" in json.dumps(to_dict(config))

    def main(_: list[str]) -> int:
        import logging

        logging.getLogger("ringbpt.any").info("from https://me:geheim@host, hf_abcdefgh123 \x1b[2J")
        raise UserError("at https://me:geheim@host, 0123456789abcdef")

    assert run_main(main, []) == 2
    out, err = capsys.readouterr()
    assert out == "from https://me:***@host, *** \\x1b[2J\n" and err == "error: at https://me:***@host, ***\n"


def test_a_run_keeps_no_password(tmp_path):
    tree = parse_args(
        ["--train_dataset.type=python", "--logger.experiment_note=https://a:geheim@b", "--mesh_dim=1,1,1,1"]
    )
    assert "geheim" not in json.dumps(to_dict(parse(tree, 1)))
