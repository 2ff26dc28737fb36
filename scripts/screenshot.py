"""The picture of the inspect page in docs/, taken by headless Chromium.

python scripts/screenshot.py [--output=docs/inspect.png]
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ringbpt.config import Flag, UserError, check_writable, printed_help, read_flags, run_main, user_path
from ringbpt.inspect import main as inspect

FLAGS = {"output": Flag(str, "docs/inspect.png", "the picture")}
ROLES = ("user", "assistant")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def talk(number: int) -> list[dict[str, str]]:
    """A conversation of one to three turns."""
    asked = [f"What is {number} times {turn + 2}?" for turn in range(1 + number * 7 % 3)]
    said = [f"{number} times {turn + 2} is {number * (turn + 2)}." for turn in range(len(asked))]
    pairs = zip(asked, said, strict=True)
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(ROLES, pair, strict=True)]


def main(argv: list[str]) -> int:
    if printed_help(argv, doc=__doc__, own=FLAGS):
        return 0
    output = user_path(read_flags(argv, FLAGS)["output"]).absolute()
    check_writable("--output", output, folder=False)
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise UserError(f"none of {', '.join(BROWSERS)} is installed: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder:
        page, data = Path(folder) / "page.html", Path(folder) / "talk.jsonl"
        data.write_text("".join(json.dumps({"messages": talk(number)}) + "\n" for number in range(400)))
        for_data = ["--train_dataset.type=files", f"--train_dataset.files_dataset.path={data}"]
        for_data += ["--train_dataset.files_dataset.seq_length=512", "--train_dataset.files_dataset.batch_size=8"]
        for_data += [f"--train_dataset.cache_dir={folder}/cache", "--train_dataset.packing=best_fit"]
        shown = [f"--html={page}", "--batches=1", "--rows=3", "--tokens=512"]
        inspect(["--config=configs/debug.py", "--train_dataset.text_processor.chat_template=chatml", *for_data, *shown])
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1180,1000"]
        command = [browser, *flags, f"--user-data-dir={folder}/profile", f"--screenshot={output}", page.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
