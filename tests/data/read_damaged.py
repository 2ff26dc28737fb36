"""Reads data sets one after the other and says of each, on a line, what came of it; what crashes ends it.

python -m tests.data.read_damaged FILE ...
"""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

from ringbpt.config import UserError
from tests.data.test_formats import source


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        for name in sys.argv[1:]:
            try:
                data = source(Path(cache), name)
                rows = json.dumps([data[index] for index in range(len(data))], default=str)
                said = f"rows {hashlib.sha256(rows.encode('utf-8', 'surrogateescape')).hexdigest()}"
            except UserError as error:
                said = "refused" if "\n" not in str(error) else f"lines {error!r}"
            except Exception as error:
                said = f"traceback {type(error).__name__}: {error!r}"
            print(f"{name}\t{said}", flush=True)


if __name__ == "__main__":
    main()
