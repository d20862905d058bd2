"""Measure what many fragments cost a reader, locally and over the S3 protocol, and what consolidating them changes.

    python -m benchmarks.store.fragments [--fragments 10 100 ...] [--quick] [--json]

50,000 cells x 64 features in 10 to 5,000 fragments. A fresh process opens the array, reads 10,000 contiguous cells and
10,000 random ones, and lists the fragments as a shard does. There are four states: as written, with commits
consolidated, with fragment metadata consolidated, and with fragments consolidated to one (memory bounded to 1 GiB). The
S3 server here waits 20 ms before each answer, as the real one does at best. The program counts requests; these carry
over to the real one. States are interleaved: the median of three rounds (least, most), one round of 5,000 fragments.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tiledb

from benchmarks.common import arguments_parser, spread, table
from census_tf_dagster.identity import Identity
from census_tf_dagster.io.s3 import S3Settings
from census_tf_dagster.io.storage import Storage
from census_tf_dagster.store.array import EmbeddingsArray

CELLS, FEATURES, READ = 50_000, 64, 10_000
BUCKET, LATENCY_MS = "bucket", 20
STATES: dict[str, tuple[str, ...]] = {
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
LISTER = """
import sys, time
from census_tf_dagster.io.s3 import S3Settings
from census_tf_dagster.io.storage import Storage
from census_tf_dagster.store.array import EmbeddingsArray
array = EmbeddingsArray(sys.argv[1], Storage(S3Settings("us-east-1", sys.argv[2])), (50_000, 64), 64)
began = time.perf_counter()
array.fragments()
print(time.perf_counter() - began)
"""
WAYS = ("open", "slice", "random", "list")


def build(folder: Path, fragments: int) -> Path:
    """Write an array of so many fragments."""
    identity = Identity("s3://x", "d", "o", None, 1, "census", "g", "c", "fp32", "bfloat16", FEATURES)
    array = EmbeddingsArray.create(str(folder / f"{fragments}"), Storage(), identity, CELLS)
    each = CELLS // fragments
    with array.writing() as write:
        for start in range(0, CELLS, each):
            write(np.arange(start, start + each), np.ones((each, FEATURES), np.float32))
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


def read(uri: str, endpoint: str, way: str) -> float:
    """Read in a fresh process; return its seconds."""
    config = S3Settings("us-east-1", endpoint).tiledb_config() if endpoint else {}
    arguments = [LISTER, uri, endpoint] if way == "list" else [READER, uri, json.dumps(config), way]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", *arguments], capture_output=True, text=True, check=True
    )
    return float(done.stdout)


@contextmanager
def s3_server(folder: Path) -> Iterator[tuple[str, Path]]:
    """Serve the folders in `folder` as buckets; give its address, and its log with a line a request."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    log = folder / "requests.log"
    command = [str(Path(sys.executable).with_name("hadro")), "--port", str(port), "--latency-ms", str(LATENCY_MS)]
    with log.open("w") as printed, subprocess.Popen([*command, str(folder)], stdout=printed, stderr=printed) as server:
        try:
            while "running on" not in log.read_text():
                assert server.poll() is None, log.read_text()
                time.sleep(0.05)
            yield f"http://127.0.0.1:{port}", log
        finally:
            server.terminate()


def over_s3(array: str, endpoint: str, log: Path, way: str) -> tuple[float, int]:
    """Read an array over S3; return seconds and requests."""
    before = log.read_text().count("HTTP/1.1")
    seconds = read(f"s3://{BUCKET}/{array}", endpoint, way)
    return seconds, log.read_text().count("HTTP/1.1") - before


def main() -> None:
    """Measure, print a table."""
    parser = arguments_parser(__doc__, quick="10 and 100 fragments")
    parser.add_argument("--fragments", type=int, nargs="+", default=(10, 100, 1000, 5000), help="how many")
    arguments = parser.parse_args()
    os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test")
    counts = (10, 100) if arguments.quick else arguments.fragments
    rows: list[list[str]] = []
    answers: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place, s3_server(Path(place)) as (endpoint, log):
        bucket = Path(place) / BUCKET
        bucket.mkdir()
        for fragments in counts:
            written = build(bucket, fragments)
            arrays, costs = {"as written": written}, {"as written": 0.0}
            for state, modes in STATES.items():
                arrays[state] = bucket / f"{fragments}-{state.replace(' ', '-')}"
                shutil.copytree(written, arrays[state])
                costs[state] = consolidate(arrays[state], modes)
            found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
            requests: dict[tuple[str, str], int] = {}
            for way, _, (state, array) in product(WAYS, range(3 if fragments <= 1000 else 1), arrays.items()):
                found["local", state, way].append(read(str(array), "", way))
                seconds, requests[state, way] = over_s3(array.name, endpoint, log, way)
                found["s3", state, way].append(seconds)
            for state in arrays:
                answers.append(
                    {
                        "fragments": fragments,
                        "state": state,
                        "cpu_seconds": costs[state],
                        "requests": {way: requests[state, way] for way in WAYS},
                        "seconds": {f"{at} {way}": found[at, state, way] for at in ("local", "s3") for way in WAYS},
                    }
                )
                cells = [f"{costs[state]:.1f}"]
                cells += [spread(found["local", state, way], 2) for way in WAYS]
                cells += [f"{spread(found['s3', state, way], 1)}: {requests[state, way]:,}" for way in WAYS]
                rows.append([f"{fragments:,} {state}", *cells])
                print(rows[-1], file=sys.stderr, flush=True)
            for array in arrays.values():
                shutil.rmtree(array)
    print(f"{CELLS:,} cells x {FEATURES}; seconds of a fresh process, for {READ:,} cells contiguous and random")
    table(["fragments", "CPU s", *(f"local {way}" for way in WAYS), *(f"S3 {way}, s: requests" for way in WAYS)], rows)
    if arguments.json:
        written, best = ([one for one in answers if one["state"] == state][-1] for state in ("as written", "metadata"))
        ours, reference = best["requests"]["open"], written["requests"]["open"]
        print(
            json.dumps(
                {"ours": ours, "reference": reference, "ratio": ours / reference, "unit": "requests", "rows": answers}
            )
        )


if __name__ == "__main__":
    main()
