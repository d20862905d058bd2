"""Environments with other versions of packages than this project's, for long tests."""

import subprocess
import sys
from pathlib import Path

import pytest


def environment(cache: pytest.Cache, name: str, packages: list[str]) -> Path:
    """Return the Python of an environment with some packages; the first call makes it."""
    folder = Path(cache.mkdir(name))
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *packages]
        subprocess.run(command, check=True)
        (folder / "ready").touch()
    return python
