"""The one command for a GPU machine, rehearsed on a CPU."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import REPOSITORY


def constrained(name: str) -> set[str]:
    """Return the lines ``name==version`` of a file, names in their normal form."""
    lines = re.findall(r"^([\w.-]+)==(\S+)", (REPOSITORY / name).read_text(), re.M)
    return {f"{re.sub(r'[-_.]+', '-', package).lower()}=={version}" for package, version in lines}


def test_versions_of_all_carried_packages_are_constrained() -> None:
    listed = (REPOSITORY / "benchmarks" / "gpu-packages.txt").read_text().splitlines()
    packages = [line for line in listed if not line.startswith("#")]
    ours = {line.split("==")[0] for line in constrained("constraints.txt")}
    assert {package for package in packages if "==" not in package} <= ours
    assert {package for package in packages if "==" in package} <= constrained("constraints-oracle.txt")


@pytest.mark.soak
def test_rehearsal(tmp_path: Path) -> None:
    """Tests, engine and whole loop, upstream's command made by the script itself."""
    tree, found = tmp_path / "tree", tmp_path / "found"
    shutil.copytree(REPOSITORY, tree, ignore=shutil.ignore_patterns(".*", "demo-data"))
    env = {**os.environ, "DEVICE": "cpu", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env.pop("PYTHONPATH", None)
    command = ["bash", "benchmarks/gpu.sh", "exemplar", str(found)]
    done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    printed = (found / "cpu-exemplar.txt").read_text()
    assert re.search(r"^\d+ passed", printed, re.M)
    assert len(re.findall(r"ratio; by FLOPs", printed)) == 3
    assert "the two arrays hold the same cells" in printed
