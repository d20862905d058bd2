"""Measure what checksums of megabatches and files cost a shard: its CPU time with and without them.

    python -m benchmarks.store.checksums [--quick] [--json]

Does all the work of a shard except the model: it reads and tokenizes counts of a Census of 60,000 genes megabatch by
megabatch, rounds and writes made-up values of 2,048 features, and reads everything back. *Without* means that no
checksum is computed or stored in the files. Interleaved, CPU seconds of the process. Peak memory is measured in a
process for each.

The difference of the two is smaller than the noise of a shared machine, so the checksums are also timed alone: XXH3
where the shard computes it, and SHA-256 by hashlib over all files of the array, once as written and once as read. So
are the looks at each cell's counts and at its embedding's values, which find the cells that are set aside.
"""

import hashlib
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.common import VOCABULARIES, arguments_parser, array_identity, peak_gib, spread, table
from census_tf_dagster.census import cells as cells_module
from census_tf_dagster.census.cells import read_cells
from census_tf_dagster.census.division import divide
from census_tf_dagster.census.plan import plan_totals, with_checksums, write_plan
from census_tf_dagster.census.release import open_release
from census_tf_dagster.demo.census import build_census
from census_tf_dagster.demo.checkpoint import build_checkpoint
from census_tf_dagster.demo.synthetic import KNOWN_ASSAYS, synthetic_organism
from census_tf_dagster.inference.checkpoint import read_checkpoint
from census_tf_dagster.inference.tokens import Tokenizer
from census_tf_dagster.io.storage import Storage
from census_tf_dagster.store import array as array_module
from census_tf_dagster.store.array import EmbeddingsArray, round_to_bfloat16
from census_tf_dagster.store.layout import ReleaseFolder
from census_tf_dagster.store.verification import verify_shard
from census_tf_dagster.store.write_notes import Checksum, NoteWriter, Written

FEATURES = 2048
RELEASE = "2025-11-08"
WITH, WITHOUT = "with", "without"
CHECKSUMS, CELLS = ALONE = ("checksums", "looking for cells to set aside")


def build(place: Path, cells: int, genes: int) -> None:
    """Write a Census and a checkpoint."""
    organism = synthetic_organism("homo_sapiens", "Homo sapiens", cells, genes, "ENSG", seed=1, median_genes=1800)
    build_census(str(place / "census"), RELEASE, [organism])
    known = organism.genes["feature_id"].tolist()[: VOCABULARIES["sapiens"]]
    build_checkpoint(place / "checkpoint", {"homo_sapiens": known}, KNOWN_ASSAYS, embed_dim=16, seq_len=2047)


def work(place: str, way: str, cells: int, megabatch: int, round_: int) -> dict[str, float]:
    """Do a shard's work one way; return CPU seconds and the peak memory of this process."""
    storage = Storage()
    identity = array_identity("bfloat16", FEATURES)
    folder = ReleaseFolder.of(f"{place}/store-{way}-{round_}", "s", "r", identity)
    joinids = np.arange(cells, dtype=np.int64)
    batches = with_checksums(divide(joinids, np.full(cells, 1800, np.int32), 1, megabatch).megabatches, joinids)
    rng = np.random.default_rng(0)
    values = (rng.normal(size=FEATURES) + 0.3 * rng.normal(size=(megabatch, FEATURES))).astype(np.float32)
    seconds = dict.fromkeys(ALONE, 0.0)

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*arguments: object) -> Any:
            began = time.thread_time()
            result = function(*arguments)
            seconds[name] += time.thread_time() - began
            return result

        return measured

    with ExitStack() as stack:
        if way == WITH:
            stack.enter_context(mock.patch.object(Checksum, "add", timed(CHECKSUMS, Checksum.add)))
            look = timed(CELLS, cells_module._check_counts)
            stack.enter_context(mock.patch.object(cells_module, "_check_counts", look))
        else:
            stack.enter_context(mock.patch.object(array_module, "_SHA256", {"_type": "NoOpFilter"}))
            stack.enter_context(mock.patch.object(Checksum, "add"))
        plan = write_plan(storage, folder.plan, joinids, batches, plan_totals(batches, 1, 0))
        array = EmbeddingsArray.create(folder.array, storage, identity, cells)
        release = stack.enter_context(open_release(f"{place}/census", "homo_sapiens", storage))
        tokenizer = Tokenizer.build(release.genes().ids, read_checkpoint(Path(place) / "checkpoint"))
        tokenizer(read_cells(release, joinids[:megabatch]))
        notes = NoteWriter(storage, folder, plan, 0)
        seconds.update(dict.fromkeys(ALONE, 0.0))
        began = time.process_time()
        with array.writing() as write:
            for batch in batches:
                ids = joinids[batch.first : batch.last + 1]
                tokenizer(read_cells(release, ids))
                timed(CELLS, _all_finite)(values[: len(ids)])
                rounded = round_to_bfloat16(values[: len(ids)])
                if way == WITH:
                    notes.note(Written.of(batch, ids, rounded))
                write(ids, rounded)
        assert not verify_shard(array, plan, folder, 0)
        cpu = time.process_time() - began
        if way == WITH:
            began = time.thread_time()
            for _ in ("written", "read"):
                for path in Path(folder.array).rglob("*.tdb"):
                    hashlib.sha256(path.read_bytes())
            seconds[CHECKSUMS] += time.thread_time() - began
        return {"cpu": cpu, "peak": peak_gib(), **seconds}


def _all_finite(values: np.ndarray) -> bool:
    """Look at values as the engine does, which looks at those of a row."""
    return bool(np.isfinite(values).all())


def main() -> None:
    """Measure both ways in turn, print a table."""
    arguments = arguments_parser(__doc__, quick="1,024 cells, 2 rounds").parse_args()
    cells, genes, megabatch, rounds = (1024, 5_000, 512, 2) if arguments.quick else (32_768, 60_000, 16_384, 5)
    spawn = multiprocessing.get_context("spawn")
    found: dict[str, list[dict[str, float]]] = {WITH: [], WITHOUT: []}
    with tempfile.TemporaryDirectory() as place:
        build(Path(place), cells, genes)
        for round_, way in product(range(-1, rounds), (WITH, WITHOUT)):
            with spawn.Pool(1) as pool:
                answer = pool.apply(work, (place, way, cells, megabatch, round_))
            if round_ >= 0:  # The first round compiles.
                found[way].append(answer)
    ratios = [one["cpu"] / other["cpu"] for one, other in zip(found[WITH], found[WITHOUT], strict=True)]
    print(f"{cells:,} cells, {genes:,} genes, {FEATURES:,} features, {rounds} rounds, interleaved")
    rows = [
        [way, *(spread([one[name] for one in answers], 2) for name in ("cpu", "peak"))]
        for way, answers in found.items()
    ]
    table(["", "CPU s", "peak GiB"], [*rows, ["with / without, pair by pair", spread(ratios, 3), ""]])
    for name in ALONE:
        alone = [one[name] / one["cpu"] for one in found[WITH]]
        print(f"{name} alone, of the CPU seconds: {spread(alone, 4)}")
    if arguments.json:
        ours, reference = (float(np.median([one["cpu"] for one in found[way]])) for way in (WITH, WITHOUT))
        print(
            json.dumps(
                {
                    "ours": ours,
                    "reference": reference,
                    "ratio": float(np.median(ratios)),
                    "unit": "CPU s",
                    "rows": found,
                }
            )
        )


if __name__ == "__main__":
    main()
