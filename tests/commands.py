"""The command line in a process of its own."""

import subprocess
import sys
from typing import Any

IVSMC = [sys.executable, "-W", "error", "-m", "ivsmc"]


def command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run ``ivsmc`` with ``arguments``; warnings are errors."""
    return subprocess.run(
        [*IVSMC, *arguments], capture_output=True, text=True, check=False, **options
    )
