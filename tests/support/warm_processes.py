"""Runs commands in forks of one process that has imported Dagster and TileDB, because importing takes them seconds.

Each command still has a process, environment, working folder and exit status of its own.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
# None of these starts a thread when it is imported, which a fork would lack.
_CONTEXT.set_forkserver_preload(
    [
        "cellxgene_census",
        "census_tf_dagster.cli",
        "census_tf_dagster.definitions",
        "census_tf_dagster.pipeline.embed_shard",
        "census_tf_dagster.pipeline.finish_array",
        "census_tf_dagster.pipeline.plan_release",
        "dagster._cli",
        "dagster_aws.components",
    ]
)


def run_module(
    module: str, arguments: Sequence[str], folder: Path, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ARGUMENTS` in a folder and wait for it."""
    with tempfile.TemporaryDirectory() as place:
        out, err = (Path(place) / name for name in ("out", "err"))
        process = _CONTEXT.Process(
            target=_become, args=(module, list(arguments), str(folder), dict(environment), str(out), str(err))
        )
        process.start()
        process.join()
        assert process.exitcode is not None
        return subprocess.CompletedProcess([module, *arguments], process.exitcode, out.read_text(), err.read_text())


def _become(module: str, arguments: list[str], folder: str, environment: dict[str, str], out: str, err: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    for descriptor, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
