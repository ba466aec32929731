"""Programs that tests need and a machine may lack."""

import os
import shutil
from typing import NoReturn

import pytest


def lacking(what: str) -> NoReturn:
    """Skip the test, saying ``what`` is missing; fail where ``IVSMC_REQUIRE_TOOLS=1``."""
    if os.environ.get("IVSMC_REQUIRE_TOOLS") == "1":
        pytest.fail(f"IVSMC_REQUIRE_TOOLS=1, but {what}")
    pytest.skip(what)


def program(name: str) -> str:
    """The path of a program that the test needs."""
    return shutil.which(name) or lacking(f"{name} is not installed")
