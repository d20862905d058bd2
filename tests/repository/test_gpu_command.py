"""The command that measures on a GPU machine, `benchmarks/gpu.sh`: rehearsed in small on the CPU, part by part."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.project import REPOSITORY, UpstreamCommand

pytestmark = pytest.mark.takes(110)


def rehearse(part: str, output: Path, upstream: str = "") -> str:
    """Run a part on the CPU; return what it said."""
    python = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{python}:{os.environ['PATH']}", "DEVICE": "cpu", "PARTS": part}
    command = ["bash", str(REPOSITORY / "benchmarks" / "gpu.sh"), "exemplar", str(output)]
    done = subprocess.run(command, env={**environment, "UPSTREAM": upstream or "/none"}, capture_output=True, text=True)
    said = (output / f"cpu-exemplar-{part}.txt").read_text()
    assert done.returncode == 0, said[-4000:] + done.stderr[-2000:]
    assert re.search(rf"^== {part} ended after \d+ s with 0$", said, re.M), said[-1000:]
    return said


def test_touch(tmp_path: Path) -> None:
    said = rehearse("touch", tmp_path)
    assert re.search(r"test_engine.py::\w+ PASSED", said)
    assert " passed" in said


def test_engine(tmp_path: Path) -> None:
    said = rehearse("engine", tmp_path)
    assert re.search(r"ours, fp32: [\d.,]+ cells/s", said)
    for kind in ("matrix products", "layer norm", "GELU", "pooling"):
        assert re.search(rf"^{kind} +[\d.]+ +[\d.]+%", said, re.M), kind
    assert re.search(r"everything but products and attention [\d.]+%; attention [\d.,]+ useful TFLOP/s", said)


def test_loop(tmp_path: Path) -> None:
    said = rehearse("loop", tmp_path)
    lines = re.findall(r"megabatch (\d) of 3: [\d.,]+ cells/s, device idle [\d.]+", said)
    assert lines == ["1", "2", "3"]
    assert re.search(r"our device's idle share, from its first megabatch to its last: [\d.]+", said)


@pytest.mark.soak
def test_start(tmp_path: Path) -> None:
    """Only the first process of a node compiles."""
    (answer,) = re.findall(r"^{.*}$", rehearse("start", tmp_path), re.M)
    compiled = [(one["compiled"] > 0, one["from the cache"] > 0) for one in json.loads(answer)["rows"]]
    assert compiled == [(True, False), (False, True), (False, True)]


@pytest.mark.soak
@pytest.mark.parametrize("part", ["upstream", "reference"])
def test_beside_upstream(part: str, tmp_path: Path, upstream_command: UpstreamCommand) -> None:
    said = rehearse(part, tmp_path, str(upstream_command.command))
    assert re.search(r'"ratio": [\d.]+', said)


@pytest.mark.parametrize(("body", "said"), [("exit 7", "with 7"), ("exec sleep 600", "with 124, its time was over")])
def test_a_part_that_fails_or_takes_too_long_does_not_stop_the_others(tmp_path: Path, body: str, said: str) -> None:
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit 0\necho a figure\ncase "$*" in *end_to_end*) {body};; esac\n')
    python.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "DEVICE": "cpu", "LIMIT": "2"}
    command = ["bash", str(REPOSITORY / "benchmarks" / "gpu.sh"), "sapiens", str(tmp_path)]
    done = subprocess.run(command, env={**environment, "PARTS": "loop engine"}, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.search(r"a figure\n== engine ended after \d+ s with 0$", done.stdout, re.M)
    assert re.search(rf"a figure\n== loop ended after \d+ s {said}$", done.stdout, re.M)


def constrained(name: str) -> set[str]:
    """Return the lines ``name==version`` of a file, names in their normal form."""
    lines = re.findall(r"^([\w.-]+)==(\S+)", (REPOSITORY / name).read_text(), re.M)
    return {f"{re.sub(r'[-_.]+', '-', package).lower()}=={version}" for package, version in lines}


def test_versions_of_all_carried_packages_are_constrained() -> None:
    listed = (REPOSITORY / "benchmarks" / "gpu-packages.txt").read_text().splitlines()
    packages = [line for line in listed if not line.startswith("#")]
    ours = {line.split("==")[0] for line in constrained("constraints.txt")}
    assert {package for package in packages if "==" not in package} <= ours
    assert {package for package in packages if "==" in package} <= constrained("constraints-upstream.txt")
