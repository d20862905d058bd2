"""Compiled functions work and are kept in any writable folder, even if package and HOME are not writable."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.support.project import REPOSITORY

PACKAGE = "census_tf_dagster"
FUNCTION = """
from census_tf_dagster.io.compiled import compiled

@compiled()
def total(values):
    found = 0
    for value in values:
        found += value
    return found
"""
RUN = """
import sys
from pathlib import Path
import numpy as np
from census_tf_dagster import total
from census_tf_dagster.io import compiled
if len(sys.argv) > 1:
    compiled.keep_below(Path(sys.argv[1]))
assert total.total(np.arange(4)) == 6
print(sum(total.total.stats.cache_hits.values()))
"""
ALL = """
import census_tf_dagster
from census_tf_dagster.census import cell_keys, cells, key_file
from census_tf_dagster.inference import tokens
from census_tf_dagster.store import readback
print(census_tf_dagster.__file__)
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Make a copy of the package to which nobody can write, not even root, without a home."""
    ours = tmp_path / "installed" / PACKAGE
    shutil.copytree(REPOSITORY / PACKAGE, ours, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in [ours, *(path for path in ours.rglob("*") if path.is_dir())]:
        # No folder can be made where a file exists.
        (folder / "__pycache__").touch()
    (ours / "total.py").write_text(FUNCTION)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("NUMBA_", "XDG_"))}
    return {**kept, "HOME": "/proc/none", "PYTHONPATH": str(ours.parent)}


def run(environment: dict[str, str], code: str, *arguments: object) -> str:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def found_in_cache(environment: dict[str, str], *arguments: object, before: str = "") -> int:
    """Compile in a separate process; return the number of kept results that it used."""
    return int(run(environment, before + RUN, *arguments))


def test_everything_can_be_imported(environment: dict[str, str]) -> None:
    assert run(environment, ALL).startswith(environment["PYTHONPATH"])


@pytest.mark.skipif(
    subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode != 0, reason="may not mount here"
)
def test_packages_that_are_installed_for_all_can_be_imported(environment: dict[str, str], tmp_path: Path) -> None:
    """This is like umap, whose functions numba then refuses to cache. umap itself compiles for half a minute."""
    packages = sysconfig.get_path("purelib")
    theirs = Path(environment["PYTHONPATH"]) / PACKAGE / "theirs.py"
    theirs.write_text("import numba\n@numba.njit(cache=True)\ndef one():\n    return 1\n")
    code = "import sys, pathlib\nfrom census_tf_dagster.io import compiled\n{}from census_tf_dagster import theirs"
    keep = "compiled.keep_below(pathlib.Path(sys.argv[1]))\n"
    found = []
    for text in (code.format(""), code.format(keep)):
        command = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
        python = [sys.executable, "-W", "ignore", "-c", text, str(tmp_path / "cache")]
        line = ["unshare", "--mount", "sh", "-c", command, packages, *python]
        done = subprocess.run(line, env=environment, cwd="/", capture_output=True, text=True)
        found.append((done.returncode, "no locator available" in done.stderr))
    assert found == [(1, True), (0, False)]


def test_without_any_place(environment: dict[str, str]) -> None:
    assert found_in_cache(environment) == 0


def test_the_cache_of_the_deployment_is_the_last_resort(environment: dict[str, str], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert [found_in_cache(environment, cache) for _ in range(2)] == [0, 1]
    assert [path.name for path in cache.iterdir()] == ["numba"]


def test_a_cache_that_cannot_be_written_either(environment: dict[str, str]) -> None:
    assert found_in_cache(environment, "/proc/none") == 0


def test_numbas_own_place_comes_first(environment: dict[str, str], tmp_path: Path) -> None:
    environment["NUMBA_CACHE_DIR"] = str(tmp_path / "numba")
    assert [found_in_cache(environment, tmp_path / "cache") for _ in range(2)] == [0, 1]
    assert not (tmp_path / "cache").exists()


def test_functions_of_packages_that_keep_none(environment: dict[str, str], tmp_path: Path) -> None:
    theirs = Path(environment["PYTHONPATH"]) / PACKAGE / "theirs.py"
    theirs.write_text("import numba\n@numba.njit\ndef one():\n    return 1\n")
    code = """
import sys
from census_tf_dagster import theirs
from census_tf_dagster.io.compiled import keep_compiled
keep_compiled(theirs)
assert theirs.one() == 1
print(sum(theirs.one.stats.cache_hits.values()))
"""
    environment["NUMBA_CACHE_DIR"] = str(tmp_path / "numba")
    assert [run(environment, code) for _ in range(2)] == ["0", "1"]


def test_a_full_disk_is_no_error(environment: dict[str, str], tmp_path: Path) -> None:
    full = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
    assert [found_in_cache(environment, tmp_path / "cache", before=full) for _ in range(2)] == [0, 0]
