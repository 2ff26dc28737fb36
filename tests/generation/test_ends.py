"""What begins and what ends a text: one answer for training, generation, evaluation and export."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ringbpt.config import TextProcessorConfig, TokenizerConfig, UserError
from ringbpt.data.text.chat import set_chat_template
from ringbpt.data.text.text_processor import TextProcessor
from ringbpt.data.text.tokenizers import describe_ends, keep_tokenizer, make_tokenizer
from ringbpt.generation.text import Text
from tests.data.test_chat_kinds import WRITTEN

SPECIAL = ["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]  # ids 256 ... 260
CHAT = WRITTEN["grows"].replace("CALLS", "")


def write_tokenizer(folder: Path, template: str = "", frame: bool = False, **names: str | None) -> str:
    """Bytes with special tokens, as a Hugging Face folder; frame: it puts <s> before a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(SPECIAL)
    if frame:
        fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    folder.mkdir(parents=True, exist_ok=True)
    fast.save(str(folder / "tokenizer.json"))
    says = {"bos_token": "<s>", "eos_token": "</s>", **names}
    says = {name: token for name, token in says.items() if token} | ({"chat_template": template} if template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(says))
    return str(folder)


def tokenizer_of(folder: Path, *args, **kwargs):
    return make_tokenizer(TokenizerConfig(write_tokenizer(folder, *args, **kwargs)))


@pytest.mark.parametrize("frame", [False, True])
def test_a_document_begins_as_a_prompt_does_and_as_in_transformers(tmp_path, frame):
    from transformers import AutoTokenizer

    tokenizer = tokenizer_of(tmp_path, frame=frame)
    prompt = tokenizer.encode_prompt("hi").tolist()
    document = TextProcessor(TextProcessorConfig(fields="text"), tokenizer)({"text": "hi"}, "row 1").token.tolist()
    assert prompt == AutoTokenizer.from_pretrained(str(tmp_path))("hi")["input_ids"]
    assert document == [*prompt, 257] and (prompt[0] == 256) == frame
    begin = "<s> (256)" if frame else "no bos"
    assert describe_ends(tokenizer) == f"a text begins with {begin}, ends with </s> (257)"


def test_nothing_is_invented_that_the_files_do_not_name(tmp_path):
    tokenizer = tokenizer_of(tmp_path, bos_token=None, eos_token=None)
    assert (tokenizer.ends.bos, tokenizer.ends.eos, tokenizer.ends.stop) == (None, None, frozenset())
    with pytest.raises(UserError, match=r"add_bos_token=True: .* no bos token; set it to False"):
        TextProcessor(TextProcessorConfig(fields="text"), tokenizer)
    (tmp_path / "tokenizer_config.json").unlink()  # a tokenizer.json alone says nothing: known names are asked for
    assert make_tokenizer(TokenizerConfig(str(tmp_path))).ends[:2] == (256, 257)
    write_tokenizer(tmp_path, eos_token="<|eot|>")
    with pytest.raises(UserError, match=r"tokenizer_config.json: eos_token '<\|eot\|>' is not in tokenizer.json"):
        make_tokenizer(TokenizerConfig(str(tmp_path)))


def test_a_token_that_only_the_settings_declare_is_one(tmp_path):
    write_tokenizer(tmp_path, eos_token="<|eot|>")
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    declared = {"261": {"content": "<|eot|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"added_tokens_decoder": declared}))
    tokenizer = make_tokenizer(TokenizerConfig(str(tmp_path)))
    assert tokenizer.ends.eos == 261 and tokenizer.vocab_size == 262
    assert tokenizer.encode_places("a<|eot|>", special=True).ids.tolist()[-1] == 261
    keep_tokenizer(tokenizer, tmp_path / "kept")
    assert make_tokenizer(TokenizerConfig(str(tmp_path / "kept"))).ends.stop == {261}


def said(tokenizer, tokens, *stops: str, before=()) -> tuple[str, list[int], bool]:
    text = Text(tokenizer, stops, before)
    shown = [text.add(token) for token in tokens]
    assert "".join(shown) + text.rest() == text.text
    return text.text, text.tokens, text.finished


def test_stop_strings_see_special_tokens(tmp_path):
    tokenizer = tokenizer_of(tmp_path)
    a, b, space = tokenizer.encode("ab ").tolist()
    assert said(tokenizer, [a, 260, b], "<|im_end|>") == ("a", [a, 260], True)
    assert said(tokenizer, [a, 259, b], "<|im_end|>", "<|im_start|>") == ("a", [a, 259], True)
    assert said(tokenizer, [a, 259, b, b], "<|im_start|>bb") == ("a", [a, 259, b, b], True)  # spans tokens
    assert said(tokenizer, [a, b, 260, a], "b<|im_end|>") == ("a", [a, b, 260], True)
    assert said(tokenizer, [a, space, b, a], " b") == ("a", [a, space, b], True)  # begins with a space
    assert said(tokenizer, [a, 260, b, b], "bb") == ("a", [a, 260, b, b], True)
    assert said(tokenizer, [a, 260, b]) == ("ab", [a, 260, b], False)
    assert said(tokenizer, [a, 257, b]) == ("a", [a, 257], True)


def test_a_completion_keeps_its_first_space(tmp_path):
    """Metaspace tokenizers take the first space of a text away: a completion is not the first of its text."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = ["<unk>", "<s>", "</s>", "▁", "▁a", "▁time", "t", "i", "m"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    fast = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", ignore_merges=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    tokenizer = make_tokenizer(TokenizerConfig(str(tmp_path)))
    assert said(tokenizer, [5], " time", before=[4]) == ("", [5], True)
    assert said(tokenizer, [5, 6], before=[1, 4])[0] == " timet"
    assert said(tokenizer, [5], before=[])[0] == "time"


def test_what_ends_a_turn_ends_a_text(tmp_path):
    """Also of a base model that a flag's template has taught conversations; kept with the run, and exported."""
    tokenizer = tokenizer_of(tmp_path / "own", CHAT)
    set_chat_template(tokenizer, "", "chat_template")
    assert tokenizer.ends.stop == {257, 260}
    base = tokenizer_of(tmp_path / "base", frame=True)
    set_chat_template(base, "", "chat_template")
    assert base.ends.stop == {257}
    set_chat_template(base, "chatml", "chat_template")
    assert base.ends.stop == {257, 260}
    keep_tokenizer(base, tmp_path / "kept")
    kept = make_tokenizer(TokenizerConfig(str(tmp_path / "kept")))
    assert (
        (kept.ends.stop, kept.ends[:2]) == (base.ends.stop, base.ends[:2])
        and kept.chat_template == base.chat_template
        and kept.ends.begins
    )
    generation = json.loads((tmp_path / "kept" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 256, "eos_token_id": [257, 260]}
    keep_tokenizer(base, tmp_path / "without", begins=False)  # trained with add_bos_token=False
    assert not make_tokenizer(TokenizerConfig(str(tmp_path / "without"))).ends.begins


def test_transformers_reads_what_a_run_keeps(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = tokenizer_of(tmp_path / "own", frame=True)
    set_chat_template(tokenizer, CHAT, "chat_template")
    keep_tokenizer(tokenizer, tmp_path / "kept")
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "kept"))
    messages = [{"role": "user", "content": "q"}]
    prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    from ringbpt.generation.text import make_chat_encoder

    np.testing.assert_array_equal(make_chat_encoder(tokenizer)(messages, None, "w", {}), prompt)
    assert theirs("hi")["input_ids"] == tokenizer.encode_prompt("hi").tolist()
    assert (theirs.bos_token_id, theirs.eos_token_id) == (256, 257)


def test_sentencepiece_is_kept(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the keys stay " * 5] * 20),
        model_prefix=str(tmp_path / "sp"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = make_tokenizer(TokenizerConfig(str(tmp_path / "sp.model")))
    set_chat_template(tokenizer, "chatml", "chat_template")
    keep_tokenizer(tokenizer, tmp_path / "kept", begins=False)
    kept = make_tokenizer(TokenizerConfig(str(tmp_path / "kept")))
    assert kept.chat_template == tokenizer.chat_template and kept.ends.eos == tokenizer.ends.eos
    np.testing.assert_array_equal(kept.encode("the keys"), tokenizer.encode("the keys"))
    assert tokenizer.encode_prompt("the")[0] == tokenizer.ends.bos != kept.encode_prompt("the")[0]


TRAIN = [
    *("--mesh_dim=1,1,1,1", "--num_cpu_devices=1", "--dtype=fp32", "--llama.vocab_size=264", "--llama.hidden_size=64"),
    *("--llama.intermediate_size=128", "--llama.num_hidden_layers=2", "--llama.num_attention_heads=4"),
    *("--llama.max_sequence_length=128", "--train_dataset.packing=best_fit", "--total_steps=200", "--log_freq=50"),
    *("--train_dataset.json_dataset.seq_length=64", "--train_dataset.json_dataset.batch_size=8"),
    *("--optimizer.adamw_optimizer.lr=3e-3", "--optimizer.adamw_optimizer.end_lr=3e-4"),
    *("--optimizer.adamw_optimizer.lr_warmup_steps=10", "--optimizer.adamw_optimizer.lr_decay_steps=200"),
    "--logger.experiment_id=chats",
]


@pytest.mark.slow
def test_taught_chats_from_nothing_it_stops_where_transformers_stops(tmp_path):
    """200 steps on chats, exported, generated by transformers with the exported template and ends; and back."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    vocab_file = write_tokenizer(tmp_path / "tok", CHAT)
    turns = lambda n: [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a" * (1 + n % 5)}]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": turns(n)}) + "\n" for n in range(200)))
    root = Path(__file__).parents[2]

    def command(*words: str) -> None:
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "RINGBPT_CACHE": str(tmp_path / "cache")}
        environment |= {"PYTHONPATH": str(root)}
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr

    data = ["--train_dataset.json_dataset.path=chat.jsonl", f"--tokenizer.vocab_file={vocab_file}"]
    command("-m", "ringbpt.train", *TRAIN, *data, "--logger.output_dir=runs")
    command(str(root / "scripts/jax2hf.py"), "--load_checkpoint=params::runs/chats", "--output_dir=exported")
    questions = [turns(n)[:1] for n in (3, 16, 42)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"messages": asked}) + "\n" for asked in questions))
    found = []
    for checkpoint in ("params::runs/chats", "huggingface::exported"):
        flags = (f"--load_checkpoint={checkpoint}", "--prompts=in.jsonl", "--output=out.jsonl", "--max_new_tokens=24")
        command("-m", "ringbpt.generate", *flags, "--mesh_dim=1,1,1,1", "--num_cpu_devices=1")
        found.append([json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()])
    model = AutoModelForCausalLM.from_pretrained(str(tmp_path / "exported"), dtype=torch.float32)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "exported"))
    for number, asked in enumerate(questions):
        prompt = theirs.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        want = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
        for rows in found:
            assert (rows[number]["tokens"], rows[number]["finish_reason"]) == (want, "stop")
        assert want[-1] == 260 and set(found[0][number]["completion"]) == {"a"}
