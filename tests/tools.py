"""Programs that tests need and a machine may lack."""

import shutil

import pytest


def program(name: str) -> str:
    """The path of a program that the test needs; skips the test where it is not installed."""
    return shutil.which(name) or pytest.skip(f"{name} is not installed")
