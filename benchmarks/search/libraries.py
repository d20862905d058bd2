"""Compares libraries for an index: recall, queries per second of a core, bytes per vector, cost and memory of a build.

    python -m benchmarks.search.libraries --cells 1000000 --noise 0.05

The vectors are made to be like embeddings: 500 clusters of very different sizes in 20 groups, each with its own shape
in 96 dimensions whose scale falls with the square root of their number, a common mean that is large, a curved map to
2,048 features, and isotropic noise. They are rounded to bfloat16 as an array's are. The queries are other vectors of
the same clusters, and recall is measured against their exact neighbours among all 2,048 features. Rates are per second
of CPU time, so that they do not depend on the number of cores. It needs faiss-cpu beside the project.
"""

import argparse
import multiprocessing
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import faiss
import numpy as np
import tiledb
from tiledb.vector_search.ivf_flat_index import IVFFlatIndex

from census_tf_dagster.search.cluster import cluster
from census_tf_dagster.search.projection import Projection
from census_tf_dagster.store.array import round_to_bfloat16

FEATURES, LATENT, CLUSTERS, QUERIES, NEAREST = 2048, 96, 500, 1000, 10
BLOCK = 32_768
THREADS = 2


def cpu() -> float:
    """CPU seconds of this process and of its finished children."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def make_vectors(path: Path, n: int, noise: float) -> np.ndarray:
    rng = np.random.default_rng(7)
    spectrum = (np.arange(1, LATENT + 1) ** -0.5).astype(np.float32)
    groups = 2 * rng.normal(size=(20, LATENT))
    centres = groups[rng.integers(20, size=CLUSTERS)] + 1.2 * rng.normal(size=(CLUSTERS, LATENT))
    scales = rng.gamma(4, 0.25, size=(CLUSTERS, LATENT))
    donors = 0.3 * rng.normal(size=(300, LATENT))
    shares = rng.dirichlet(np.full(CLUSTERS, 0.3))
    to_features = (rng.normal(size=(LATENT, FEATURES)) / np.sqrt(LATENT)).astype(np.float32)
    mean = (3 * rng.normal(size=FEATURES)).astype(np.float32)
    vectors = np.lib.format.open_memmap(path, "w+", np.float32, (n, FEATURES))
    for start in range(0, n, BLOCK):
        rng = np.random.default_rng([7, start])
        size = min(BLOCK, n - start)
        which = rng.choice(CLUSTERS, size, p=shares)
        latent = centres[which] + scales[which] * rng.normal(size=(size, LATENT)) + donors[rng.integers(300, size=size)]
        curved = np.tanh((latent.astype(np.float32) * spectrum) @ to_features) + mean
        vectors[start : start + size] = round_to_bfloat16(
            curved + np.float32(noise) * rng.standard_normal((size, FEATURES), np.float32)
        )
    return vectors


def exact(vectors: np.ndarray, queries: np.ndarray, mean: np.ndarray) -> np.ndarray:
    distances = np.full((len(queries), NEAREST), np.inf, np.float32)
    found = np.zeros((len(queries), NEAREST), np.int64)
    for start in range(0, len(vectors), BLOCK):
        near, rows = faiss.knn(queries - mean, vectors[start : start + BLOCK] - mean, NEAREST)
        near, rows = np.hstack([distances, near]), np.hstack([found, rows + start])
        order = np.argsort(near, axis=1)[:, :NEAREST]
        distances, found = np.take_along_axis(near, order, 1), np.take_along_axis(rows, order, 1)
    return found


class Trial:
    """Prints what an index does with the queries."""

    def __init__(self, truth: np.ndarray, queries: np.ndarray) -> None:
        self._truth, self._queries = truth, queries

    def __call__(self, name: str, search: Callable[[np.ndarray], np.ndarray]) -> None:
        """Search all queries at once, and one alone."""
        began = cpu()
        found = search(self._queries)
        rate = len(self._queries) / (cpu() - began)
        hits = [len(set(mine) & set(right)) for mine, right in zip(found, self._truth, strict=True)]
        one = cpu()
        search(self._queries[:1])
        print(
            f"{name:44} recall@10 {np.mean(hits) / NEAREST:.3f}  {rate:7.0f} queries/s of a core in a batch of "
            f"{len(self._queries):,}, {1000 * (cpu() - one):6.1f} CPU ms for a single one",
            flush=True,
        )


def clustered(folder: Path, partitions: int) -> float:
    """Build the index; return the peak memory of the process that did it, in GiB."""
    cluster(str(folder / "ivf"), *(str(folder / name) for name in ("projected", "ids", "sample.npy")), partitions, {})
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


def try_tiledb(projected: np.ndarray, sample: np.ndarray, trial: Trial, folder: Path) -> None:
    n, dimensions = projected.shape
    filters = tiledb.FilterList([tiledb.ByteShuffleFilter(), tiledb.ZstdFilter(3)])
    rows = tiledb.Dim("rows", (0, dimensions - 1), dimensions, dtype=np.int32)
    cells = tiledb.Dim("cols", (0, n - 1), min(n, 4096), dtype=np.int32)
    ids = tiledb.Dim("rows", (0, n - 1), min(n, 65_536), dtype=np.int32)
    for name, dims, dtype in (("projected", (rows, cells), np.float32), ("ids", (ids,), np.uint64)):
        attribute = tiledb.Attr("values", dtype=dtype, filters=filters)
        schema = tiledb.ArraySchema(
            tiledb.Domain(*dims), attrs=[attribute], cell_order="col-major", tile_order="col-major"
        )
        tiledb.Array.create(str(folder / name), schema)
    with tiledb.open(str(folder / "projected"), "w") as array:
        for start in range(0, n, 65_536):
            part = projected[start : start + 65_536]
            array[:, start : start + len(part)] = part.T
    with tiledb.open(str(folder / "ids"), "w") as array:
        array[:] = np.arange(n, dtype=np.uint64)
    np.save(folder / "sample.npy", sample)
    partitions = round(n**0.5)
    uri = folder / "ivf"
    began, clock = cpu(), time.monotonic()
    # A process that is forked from this one would start with this one's memory.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        peak = pool.submit(clustered, folder, partitions).result()
    size = sum(one.stat().st_size for one in uri.rglob("*") if one.is_file())
    print(
        f"TileDB-Vector-Search IVF_FLAT, {dimensions} dimensions: built in {cpu() - began:.0f} CPU s "
        f"({time.monotonic() - clock:.0f} s), at most {peak:.1f} GiB, {size / n:.0f} bytes/vector"
    )
    for budget, where in ((-1, "in memory"), (2**30 // (4 * dimensions), "read, 1 GiB")):
        index = IVFFlatIndex(uri=str(uri), memory_budget=budget)
        for probes in (4, 8, 16):
            trial(
                f"  {where}, {probes} of {partitions} partitions",
                lambda queries, index=index, probes=probes: index.query(
                    queries, k=NEAREST, nprobe=probes, nthreads=THREADS
                )[1].astype(np.int64),
            )


def try_faiss(projected: np.ndarray, sample: np.ndarray, trial: Trial, folder: Path) -> None:
    n, dimensions = projected.shape
    partitions = round(n**0.5)
    for name in ("SQ8", "PQ64", "Flat"):
        index = faiss.index_factory(dimensions, f"IVF{partitions},{name}")
        began = cpu()
        index.train(sample)
        for start in range(0, n, BLOCK):
            index.add(projected[start : start + BLOCK])
        file = folder / "faiss"
        faiss.write_index(index, str(file))
        print(
            f"faiss IVF{partitions},{name}, {dimensions} dimensions: built in {cpu() - began:.0f} CPU s, "
            f"{file.stat().st_size / n:.0f} bytes/vector"
        )
        for probes in (8, 16):
            index.nprobe = probes
            trial(
                f"  in memory, {probes} of {partitions} partitions",
                lambda queries, index=index: index.search(queries, NEAREST)[1],
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--noise", type=float, default=0.05, help="standard deviation of the isotropic noise")
    parser.add_argument("--dimensions", type=int, nargs="+", default=[256])
    args = parser.parse_args()
    faiss.omp_set_num_threads(THREADS)
    versions = ", ".join(
        f"{name} {version(name)}" for name in ("tiledb-vector-search", "faiss-cpu", "scikit-learn", "numpy")
    )
    print(f"{os.cpu_count()} cores; python {platform.python_version()}, {versions}")
    print(f"{args.cells:,} vectors of {FEATURES:,} features, noise {args.noise}", flush=True)
    with tempfile.TemporaryDirectory() as work:
        vectors = make_vectors(Path(work) / "vectors.npy", args.cells + QUERIES, args.noise)
        stored, queries = vectors[:-QUERIES], np.array(vectors[-QUERIES:])
        chosen = np.sort(np.random.default_rng(1).choice(args.cells, min(args.cells, 65_536), replace=False))
        sample = stored[chosen]
        began = cpu()
        truth = exact(stored, queries, sample.mean(axis=0))
        print(f"exact search: {QUERIES / (cpu() - began):.1f} queries/s of a core", flush=True)
        for dimensions in args.dimensions:
            began = cpu()
            projection = Projection.fit(sample, dimensions)
            projected = np.empty((args.cells, dimensions), np.float32)
            for start in range(0, args.cells, BLOCK):
                projected[start : start + BLOCK] = projection(stored[start : start + BLOCK])
            print(
                f"{dimensions} dimensions keep {projection.variance_kept:.2%} of the variance; projected in "
                f"{cpu() - began:.0f} CPU s",
                flush=True,
            )
            trial = Trial(truth, projection(queries))
            for attempt in (try_tiledb, try_faiss):
                with tempfile.TemporaryDirectory(dir=work) as folder:
                    attempt(projected, projection(sample), trial, Path(folder))


if __name__ == "__main__":
    main()
