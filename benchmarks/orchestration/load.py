"""Measure how long the definitions take to load in webserver, daemon and code location, and how much memory that takes.

    python -m benchmarks.orchestration.load [--quick] [--json]

Each load is a fresh process, after one that fills the disk's cache. For comparison, the program also shows what
importing Dagster alone takes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import spread

LOAD = """
import json, sys, time
started = time.perf_counter()
import dagster
imported = time.perf_counter()
from census_tf_dagster.definitions import defs
sets = defs().resolve_all_asset_specs()
heavy = [name for name in {heavy!r} if name in sys.modules]
# Not `getrusage`, which counts the memory of the process that started this one.
(peak,) = (int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({{"dagster_s": imported - started, "sets_s": time.perf_counter() - imported, "assets": len(sets),
                  "peak_mib": peak / 1024, "heavy": heavy}}))
"""
HEAVY = (
    "torch",
    "transcriptformer",
    "scanpy",
    "anndata",
    "numba",
    "tiledbsoma",
    "tiledb",
    "cellxgene_census",
    "pandas",
)


def main() -> None:
    """Load deployments of several sizes; print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one set, once")
    parser.add_argument("--json", action="store_true", help="a JSON object as the last line")
    arguments = parser.parse_args()
    rows = []
    for sets in (1,) if arguments.quick else (1, 10, 50):
        with tempfile.TemporaryDirectory() as place:
            _declare(Path(place), sets)
            loads = [_load(Path(place)) for _ in range(1 if arguments.quick else 6)]
        loads = loads[1:] or loads
        row: dict[str, Any] = {name: [one[name] for one in loads] for name in ("dagster_s", "sets_s", "peak_mib")}
        rows.append({"sets": sets, "assets": loads[0]["assets"], "heavy": loads[0]["heavy"]} | row)
        print(
            f"{sets:>3} sets, {loads[0]['assets']:>3} assets: import dagster {spread(row['dagster_s'], 2)} s, the rest "
            f"{spread(row['sets_s'], 2)} s, peak {max(row['peak_mib']):.0f} MiB; of {', '.join(HEAVY)} loaded: "
            f"{', '.join(loads[0]['heavy']) or 'none'}",
            flush=True,
        )
    if arguments.json:
        print(json.dumps({"rows": rows}))


def _declare(folder: Path, sets: int) -> None:
    for number in range(sets):
        path = folder / f"set_{number}" / "defs.yaml"
        path.parent.mkdir()
        attributes = {"name": f"set_{number}", "organism": "homo_sapiens", "checkpoint": "s3://models/tf_sapiens"}
        document = {"type": "census_tf_dagster.embedding_set.EmbeddingSet", "attributes": attributes}
        path.write_text(yaml.safe_dump(document))


def _load(sets: Path) -> dict[str, Any]:
    env = {**os.environ, "CENSUS_TF_SETS": str(sets)}
    command = [sys.executable, "-W", "ignore", "-c", LOAD.format(heavy=HEAVY)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    main()
