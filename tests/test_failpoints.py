"""What is installed cannot be made to die: failpoints are for tests alone."""

import re
from pathlib import Path

from ivsmc import _native

PROTOCOL = Path(__file__).resolve().parent.parent / "rust" / "proto" / "PROTOCOL.md"


def test_a_release_has_no_failpoint() -> None:
    names = re.findall(r"^\| `([a-z_]+\.[a-z_]+)` \|", PROTOCOL.read_text(), re.MULTILINE)
    assert len(names) > 60
    library = Path(_native.__file__ or "").read_bytes()
    # Its strings can be read.
    assert b"peer slots are taken; a larger region has more of them" in library
    assert [name for name in names if name.encode() in library] == []
