"""The extra `upstream`: the pins of upstream's package and ours resolve in one environment."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.project import REPOSITORY


@pytest.mark.soak
def test_upstreams_pins_resolve_with_ours(tmp_path: Path) -> None:
    """Two minutes of the package index; nothing is installed."""
    report = tmp_path / "report.json"
    dry = ["install", "--dry-run", "--ignore-installed", "--quiet", "--report", str(report)]
    command = [sys.executable, "-m", "pip", *dry, "-e", f"{REPOSITORY}[worker,ui,upstream]"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    installed = [package["metadata"] for package in json.loads(report.read_text())["install"]]
    versions = {package["name"].lower().replace("_", "-"): package["version"] for package in installed}
    assert versions["transcriptformer"] == "0.6.1"
    assert versions["torch"] == "2.5.1"
    assert {"census-tf-dagster", "dagster", "dagster-webserver", "tiledbsoma", "safetensors"} <= versions.keys()
