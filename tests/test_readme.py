"""What the README says is so: its example runs, its tables are complete."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import ivsmc

README = Path(__file__).parent.parent / "README.md"
REASONS = Path(__file__).parent.parent / "rust" / "ivsmc" / "src" / "fallback.rs"


def block(language: str) -> str:
    found = re.search(rf"^```{language}\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    assert found, f"the README has no block in {language}"
    return found[1]


def test_the_example(tmp_path: Path, free_port: int) -> None:
    example = tmp_path / "example.py"
    code = block("python")
    assert len([line for line in code.splitlines() if line]) <= 17
    example.write_text(code.replace("9000", str(free_port)))
    serve = [sys.executable, "-W", "error", str(example)]
    with subprocess.Popen(
        serve, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        assert server.stdout.readline() == "listening\n", server.stderr.read()
        client = subprocess.run([*serve, "stressed"], capture_output=True, text=True, check=False)
        assert (client.stdout, client.stderr) == ("desserts over smc\n", "")
        assert server.wait() == 0, server.stderr.read()


def test_the_table_of_fallback_reasons_is_the_codes() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| (0x[0-9a-f]{8}) \|", README.read_text(), re.MULTILINE)
    entries = re.findall(r'= "([A-Z_]+)", (0x[0-9a-f_]+);', REASONS.read_text())
    assert entries
    assert rows == [(name, code.replace("_", "")) for name, code in entries]


@pytest.mark.parametrize("variable", ["IVSMC_DEVICE", "IVSMC_EID", "IVSMC_LOCAL_DIR"])
def test_the_variables_are_read(variable: str) -> None:
    assert f"| `{variable}` |" in README.read_text()
    sources = REASONS.parent.rglob("*.rs")
    assert any(f'"{variable}"' in source.read_text() for source in sources)


@pytest.mark.parametrize("name", ["Session", "Listener", "Device", "Server"])
def test_help_explains_every_member(name: str) -> None:
    kind = getattr(ivsmc, name)
    for member in [name for name in dir(kind) if not name.startswith("_")]:
        assert getattr(kind, member).__doc__, member
