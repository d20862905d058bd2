"""Run the reference workflow from a Census to an array, in upstream's environment. Imports nothing of this project.

    python reference_workflow.py loop REQUEST.json       one shard; prints the stages' seconds as JSON
    python reference_workflow.py put EMBEDDINGS.h5ad ARRAY

Does what tools/models/transcriptformer in chanzuckerberg/cellxgene-census does, in its order. For each megabatch, it
calls `get_anndata` and writes an h5ad file. When the inference of the previous megabatch has ended, it starts a new
`transcriptformer inference` process in the background. Meanwhile a process of its own writes the previous embeddings to
the array. The differences: a local Census and array, on a CPU the switches that upstream's documentation gives for it,
and a stopwatch around upstream's functions (`upstream.py timed`).
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

STAGES = ("start-up", "read", "tokens", "compute", "write", "other")


def create_array(uri: str, features: int) -> None:
    """Create the output array as the reference workflow does."""
    import pyarrow as pa
    import tiledbsoma

    tiledbsoma.SparseNDArray.create(uri, type=pa.float32(), shape=(2**31 - 2, features)).close()


def write_coo(uri: str, joinids: np.ndarray, values: np.ndarray) -> None:
    """Write embeddings as its script does: a COO tensor into an array with default filters."""
    import pyarrow as pa
    import scipy.sparse
    import tiledbsoma

    features = values.shape[1]
    coordinates = (np.repeat(joinids, features), np.tile(np.arange(features), len(joinids)))
    with tiledbsoma.SparseNDArray.open(uri, "w") as array:
        array.write(pa.SparseCOOTensor.from_scipy(scipy.sparse.coo_matrix((values.ravel(), coordinates))))


def put(embeddings: str, uri: str) -> None:
    """Read what inference left and write it; says when it began to."""
    import anndata
    import tiledbsoma  # noqa: F401

    began = time.monotonic()
    found = anndata.read_h5ad(embeddings)
    write_coo(uri, found.obs["soma_joinid"].to_numpy(), found.obsm["embeddings"])
    print(json.dumps({"began": began}))


def write_h5ad(census: Any, organism: str, joinids: list[int], path: str) -> None:
    """Fetch a megabatch's counts and write them for upstream."""
    import cellxgene_census

    adata = cellxgene_census.get_anndata(
        census,
        organism,
        obs_coords=joinids,
        obs_column_names=("soma_joinid", "assay"),
        var_column_names=("soma_joinid", "feature_id"),
    )
    adata.var["ensembl_id"] = adata.var["feature_id"]
    adata.write_h5ad(path, compression="lzf")


class Inference:
    """One `transcriptformer inference` process."""

    def __init__(self, request: dict[str, Any], h5ad: str) -> None:
        self.h5ad, self.folder = h5ad, f"inference_{h5ad}"
        self.stamps = Path(f"{h5ad}.json").absolute()
        script = Path(__file__).with_name("upstream.py")
        command = [sys.executable, str(script), "timed", str(self.stamps), "inference", "--data-file", h5ad]
        command += ["--checkpoint-path", request["checkpoint"], "--output-path", self.folder]
        command += ["--batch-size", str(request["batch_size"])]
        if request["device"] == "cpu":
            command += ["--device", "cpu", "--precision", "32", "--disable-compile-block-mask"]
        self.started = time.monotonic()
        # Nothing but the answer goes to standard output.
        self.process = subprocess.Popen(command, stdout=sys.stderr)

    def wait(self, seconds: Counter[str]) -> None:
        """Wait for its end and add its stages' seconds."""
        if self.process.wait():
            raise SystemExit(f"transcriptformer inference ended with {self.process.returncode}")
        ended = time.monotonic()
        stamps = json.loads(self.stamps.read_text())
        Path(self.h5ad).unlink()
        seconds["start-up"] += stamps["dataset began"] - self.started
        seconds["tokens"] += stamps["dataset"]
        seconds["compute"] += stamps["compute"]
        seconds["write"] += stamps["save"]
        known = stamps["dataset"] + stamps["compute"] + stamps["save"]
        # The trainer around the model, collating, collecting, and the end of the process.
        seconds["other"] += ended - stamps["dataset began"] - known

    def put(self, uri: str, seconds: Counter[str]) -> None:
        """Start the script that writes its embeddings, and wait for it."""
        started = time.monotonic()
        command = [sys.executable, __file__, "put", f"{self.folder}/embeddings.h5ad", uri]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        began = json.loads(done.stdout.splitlines()[-1])["began"]
        seconds["start-up"] += began - started
        seconds["write"] += time.monotonic() - began
        shutil.rmtree(self.folder)


def loop(request: dict[str, Any]) -> Counter[str]:
    """Embed all cells of an organism in so many megabatches; return busy seconds of each stage."""
    import cellxgene_census

    seconds: Counter[str] = Counter()
    with cellxgene_census.open_soma(uri=request["census"]) as census:
        obs = census["census_data"][request["organism"]].obs
        joinids = obs.read(column_names=["soma_joinid"]).concat()["soma_joinid"].to_pylist()
        create_array(request["array"], request["features"])
        seconds["start-up"] += time.monotonic() - request["started"]
        running: Inference | None = None
        for part in np.array_split(joinids, request["megabatches"]):
            started = time.monotonic()
            h5ad = f"{part[0]}_{part[-1]}.h5ad"
            write_h5ad(census, request["label"], part.tolist(), h5ad)
            seconds["read"] += time.monotonic() - started
            previous = running
            if previous:
                previous.wait(seconds)
            running = Inference(request, h5ad)
            if previous:
                previous.put(request["array"], seconds)
        if running:
            running.wait(seconds)
            running.put(request["array"], seconds)
    return seconds


def main() -> None:
    """Run the loop, or write one megabatch."""
    if sys.argv[1] == "put":
        put(*sys.argv[2:])
        return
    request = json.loads(Path(sys.argv[2]).read_text())
    os.chdir(request["folder"])
    print(json.dumps({**loop(request), "ended": time.monotonic()}))


if __name__ == "__main__":
    main()
