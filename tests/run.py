"""Install ivsmc into a virtual environment and run all its tests, Rust and Python.

Needs Python 3.11 or later with pip, and cargo; everything else comes from the registries. The tests
in guests need QEMU and a kernel as well, and are skipped without. Further arguments go to pytest:
``python3 tests/run.py --stream-bytes 2G --sessions 10000 --connects 100000``.
"""

import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv"
PYTHON = ENVIRONMENT / "bin" / "python"


def main(arguments: list[str]) -> int:
    """Run the steps until one fails; return its status."""
    if not PYTHON.exists():
        venv.create(ENVIRONMENT, with_pip=True)
    steps: list[list[str | Path]] = [
        [PYTHON, "-m", "pip", "install", "--quiet", ".[test]"],
        ["cargo", "test", "--locked", "--quiet"],
        [PYTHON, "-m", "pytest", *arguments],
    ]
    for step in steps:
        words = [str(word) for word in step]
        print("+", *words, flush=True)
        start = time.monotonic()
        status = subprocess.run(words, cwd=ROOT, check=False).returncode
        print(f"  {time.monotonic() - start:.0f} s, status {status}", flush=True)
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
