"""What many fragments cost a reader, locally and over the S3 protocol, and what consolidating them changes.

    python -m benchmarks.fragments [--quick] [--json]

50,000 cells x 64 features in 10 to 5,000 fragments; opened by a fresh process which reads 10,000 contiguous cells and
10,000 random ones. As written; with commits consolidated; with fragment metadata consolidated; with fragments
consolidated to one (memory bounded to 1 GiB). Over S3, requests are counted: an S3 server in memory answers each in
about 10 ms, the real one in 20 to 50, so requests, not seconds, carry over.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tiledb

from benchmarks.common import arguments_parser, table
from census_tf_dagster.identity import Identity
from census_tf_dagster.storage import Storage
from census_tf_dagster.store.array import EmbeddingsArray
from tests.moto_servers import client, moto_server, s3_proxy

CELLS, FEATURES, READ = 50_000, 64, 10_000
STATES: dict[str, tuple[str, ...]] = {
    "as written": (),
    "commits": ("commits",),
    "metadata": ("fragment_meta",),
    "one fragment": ("fragments",),
}
READER = """
import json, sys, time
import numpy as np, tiledbsoma
uri, config, random = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3] == "random"
context = tiledbsoma.SOMATileDBContext(tiledb_config=config)
ids = np.sort(np.random.default_rng(0).choice(50_000, 10_000, replace=False)) if random else slice(20_000, 29_999)
if sys.argv[3] == "open":
    ids = slice(7, 7)
began = time.perf_counter()
with tiledbsoma.open(uri, context=context) as array:
    cells = sum(len(table) for table in array.read((ids,)).tables()) // 64
assert cells == (1 if sys.argv[3] == "open" else 10_000), cells
print(time.perf_counter() - began)
"""
WAYS = ("open", "slice", "random")


def build(folder: Path, fragments: int) -> Path:
    """Write an array of so many fragments."""
    identity = Identity("s3://x", "d", "o", None, 1, "census", "g", "c", "fp32", "bfloat16", FEATURES)
    array = EmbeddingsArray.create(str(folder / f"{fragments}"), Storage(), identity, CELLS)
    each = CELLS // fragments
    for start in range(0, CELLS, each):
        array.write(np.arange(start, start + each), np.ones((each, FEATURES), np.float32))
    return Path(array.uri)


def consolidate(array: Path, modes: tuple[str, ...]) -> float:
    """Consolidate in some ways; return the CPU seconds it took."""
    began = time.process_time()
    for mode in modes:
        config = {"sm.consolidation.mode": mode, "sm.vacuum.mode": mode, "sm.mem.total_budget": str(2**30)}
        tiledb.consolidate(str(array), config=tiledb.Config(config))
        if mode == "fragments":
            tiledb.vacuum(str(array), config=tiledb.Config(config))
    return time.process_time() - began


def read(uri: str, config: dict[str, str], way: str) -> float:
    """Read in a fresh process; return its seconds."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READER, uri, json.dumps(config), way],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(done.stdout)


def over_s3(
    array: Path, endpoint: str, bucket: str, folder: Path, ways: tuple[str, ...]
) -> dict[str, tuple[float, int]]:
    """Copy an array to S3 and read it there; return seconds and requests."""
    if not ways:
        return {}
    s3 = client(endpoint)
    s3.create_bucket(Bucket=bucket)
    for path in sorted(array.rglob("*")):
        if path.is_file():
            s3.put_object(Bucket=bucket, Key=f"array/{path.relative_to(array)}", Body=path.read_bytes())
        elif not any(path.iterdir()):
            s3.put_object(Bucket=bucket, Key=f"array/{path.relative_to(array)}/")
    found = {}
    for way in ways:
        with s3_proxy(endpoint, folder) as proxy:
            config = {
                "vfs.s3.endpoint_override": proxy.endpoint.removeprefix("http://"),
                "vfs.s3.scheme": "http",
                "vfs.s3.use_virtual_addressing": "false",
                "vfs.s3.region": "us-east-1",
            }
            seconds = read(f"s3://{bucket}/array", config, way)
        found[way] = (seconds, proxy.counts["requests"])
    return found


def main() -> None:
    """Measure, print a table."""
    parser = arguments_parser(__doc__, quick="10 and 100 fragments")
    parser.add_argument("--s3-most", type=int, default=5000, help="copy no array of more fragments to the S3 server")
    arguments = parser.parse_args()
    os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test")
    counts = (10, 100) if arguments.quick else (10, 100, 1000, 5000)
    rows: list[list[str]] = []
    answers: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place, moto_server() as endpoint:
        folder = Path(place)
        for fragments in counts:
            written = build(folder, fragments)
            for state, modes in STATES.items():
                array = folder / f"{fragments}-{len(answers)}"
                shutil.copytree(written, array)
                cost = consolidate(array, modes)
                local = {way: min(read(str(array), {}, way) for _ in range(3)) for way in WAYS}
                # A random read of thousands of fragments over this server takes longer than it teaches.
                ways = WAYS if fragments <= 100 or state == "one fragment" else WAYS[:2]
                # Copying 45,000 objects there takes minutes, and commits alone change nothing.
                skipped = ("commits",) if fragments <= 1000 else ("commits", "one fragment")
                if fragments > arguments.s3_most or (fragments >= 1000 and state in skipped):
                    ways = ()
                remote = over_s3(array, endpoint, f"bucket-{len(answers)}", folder, ways)
                answers.append(
                    {"fragments": fragments, "state": state, "cpu_seconds": cost, "local": local, "s3": remote}
                )
                cells = [f"{local[way]:.2f}" for way in WAYS]
                cells += [f"{remote[way][0]:.1f} / {remote[way][1]}" if way in remote else "" for way in WAYS]
                rows.append([f"{fragments:,} {state}", f"{cost:.1f}", *cells])
                print(rows[-1], file=sys.stderr, flush=True)
                shutil.rmtree(array)
    print(f"{CELLS:,} cells x {FEATURES}; seconds of a fresh process: open, {READ:,} contiguous, {READ:,} random cells")
    table(["fragments", "CPU s", *(f"local {way}" for way in WAYS), *(f"S3 {way}, s / requests" for way in WAYS)], rows)
    if arguments.json:
        written = [one for one in answers if one["state"] == "as written"][-1]
        best = [one for one in answers if one["state"] == "metadata"][-1]
        ours, reference = best["s3"]["open"][1], written["s3"]["open"][1]
        print(
            json.dumps(
                {"ours": ours, "reference": reference, "ratio": ours / reference, "unit": "requests", "rows": answers}
            )
        )


if __name__ == "__main__":
    main()
