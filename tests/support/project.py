"""A small project on disk, upstream's command for comparison, and how embeddings are compared."""

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse
import yaml

from census_tf_dagster.config.settings import SetSettings
from census_tf_dagster.definitions import census_resource, store_resource
from census_tf_dagster.embedding_set import EmbeddingSet
from census_tf_dagster.inference.checkpoint import Checkpoint
from census_tf_dagster.inference.checkpoint_cache import prepare
from census_tf_dagster.inference.engine import Engine
from census_tf_dagster.orchestration.asset_support import planned_context, release_context
from census_tf_dagster.orchestration.resources import CensusResource, StoreResource
from census_tf_dagster.pipeline.context import PlannedContext, ReleaseContext
from tests.support.fork_server import ForkServer
from tests.support.warm_processes import WarmProcess, run_module

REPOSITORY = Path(__file__).parents[2]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
RELEASE = "2025-11-08"

DEVICE = os.environ.get("CENSUS_TF_TEST_DEVICE", "cpu")
"""The device of the models in tests. `benchmarks/gpu.sh` runs the equality tests on a GPU."""

BOUND = 3e-5
"""Per cell ||d|| / ||ref|| between our fp32 and upstream's fp32: upstream itself moves by 1.1e-5 between torch
2.5.1 and 2.13 on a CPU."""


def relative_errors(ours: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Per cell ||ours - reference|| / ||reference||."""
    assert ours.shape == reference.shape, (ours.shape, reference.shape)
    return np.linalg.norm(ours - reference, axis=1) / np.linalg.norm(reference, axis=1)


@dataclass
class UpstreamCommand:
    """Upstream's own `transcriptformer inference` command."""

    command: Path
    folder: Path
    runs: int = 0

    def embed(self, checkpoint: Path, adata: anndata.AnnData, pretrained: Path | None = None) -> np.ndarray:
        """Embed in float32 on the CPU; rows as in `adata`, which needs var["ensembl_id"] and obs["assay"]."""
        file = self.folder / f"cells-{self.runs}.h5ad"
        adata.write_h5ad(file)
        more = [] if pretrained is None else ["--pretrained-embedding", str(pretrained)]
        return self.embed_file(checkpoint, file, *more)

    def embed_file(self, checkpoint: Path, file: Path, *more: str) -> np.ndarray:
        """Embed a file in float32 on the CPU."""
        self.runs += 1
        work = self.folder / str(self.runs)
        work.mkdir()
        command = ["inference", "--checkpoint-path", str(checkpoint)]
        command += ["--data-file", str(file), "--output-path", str(work), "--precision", "32"]
        command += ["--device", "cpu", "--disable-compile-block-mask", *more]
        # Importing what it needs takes upstream eight seconds. Its scores take hundreds of megabytes at each operation,
        # which the kernel hands out faster as huge pages.
        python = str(self.command.with_name("python"))
        server = ForkServer("upstream", ("transcriptformer.cli",), python, {"THP_MEM_ALLOC_ENABLE": "1"})
        done = run_module("tests.support.upstream_command", command, work, os.environ, server=server)
        assert done.returncode == 0, done.stderr[-3000:]
        return np.asarray(anndata.read_h5ad(work / "embeddings.h5ad").obsm["embeddings"])


def as_upstream_input(counts: Any, gene_ids: list[str], assays: list[str]) -> anndata.AnnData:
    """Return cells in the form that upstream's command reads."""
    names = [str(i) for i in range(counts.shape[0])]
    return anndata.AnnData(
        X=scipy.sparse.csr_matrix(counts, dtype=np.float32),
        obs=pd.DataFrame({"assay": assays}, index=names),
        var=pd.DataFrame({"ensembl_id": gene_ids}, index=gene_ids),
    )


def load_engine(checkpoint: Checkpoint, genes: Sequence[str], precision: str = "fp32", **options: Any) -> Engine:
    """Prepare a checkpoint beside its folder and load it."""
    prepared = prepare(checkpoint, precision, checkpoint.folder.parent / "cache")
    return Engine.load(prepared, genes, **{"device": DEVICE, **options})


@dataclass(frozen=True)
class StoredArray:
    """An array, as a fresh process read it with tiledbsoma alone."""

    ids: np.ndarray
    values: np.ndarray
    stored_values: int
    shape: tuple[int, int]
    metadata: dict[str, str]


def read_array(uri: str | Path, scratch: Path, config: dict[str, str] | None = None) -> StoredArray:
    """Read a whole array in a fresh process, with TileDB's configuration where it is not a local one."""
    out = scratch / "array.npz"
    arguments = [str(uri), str(out), json.dumps(config or {})]
    done = run_module("tests.support.array_reader", arguments, REPOSITORY, os.environ)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(out) as found:
        return StoredArray(
            ids=found["ids"],
            values=found["values"],
            stored_values=int(found["stored"]),
            shape=tuple(found["shape"].tolist()),
            metadata=json.loads(str(found["metadata"])),
        )


@dataclass
class Project:
    """A deployment below one folder, driven by the real commands."""

    folder: Path
    env: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.env = {
            **os.environ,
            "DAGSTER_HOME": str(self.folder / "dagster_home"),
            "CENSUS_TF_SETS": str(self.folder / "sets"),
            "CENSUS_TF_CENSUS": str(self.folder / "census" / "{release}"),
            "CENSUS_TF_STORE": str(self.folder / "store"),
            **self.env,
        }
        (self.folder / "dagster_home").mkdir(exist_ok=True)
        (self.folder / "dagster_home" / "dagster.yaml").write_text("telemetry:\n  enabled: false\n")

    @property
    def census(self) -> Path:
        return self.folder / "census" / RELEASE

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    def add_set(self, name: str, **attributes: Any) -> None:
        """Declare a set: fp32 on the CPU in four shards, unless said otherwise."""
        settings: dict[str, Any] = {
            "name": name,
            "checkpoint": str(self.checkpoint),
            "shards": 4,
            "megabatch_size": 64,
            "compute_precision": "fp32",
            "storage_precision": "float32",
            "device": "cpu",
            **attributes,
        }
        self._declare(name, "census_tf_dagster.embedding_set.EmbeddingSet", settings)

    def add_file_set(self, name: str, **attributes: Any) -> None:
        """Declare a set of the files in `lab`: fp32 on the CPU, unless said otherwise."""
        settings: dict[str, Any] = {
            "name": name,
            "files": str(self.folder / "lab"),
            "checkpoint": str(self.checkpoint),
            "compute_precision": "fp32",
            "storage_precision": "float32",
            "device": "cpu",
            **attributes,
        }
        self._declare(name, "census_tf_dagster.embedding_set.FileSet", settings)

    def _declare(self, name: str, kind: str, attributes: dict[str, Any]) -> None:
        path = self.folder / "sets" / name / "defs.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(yaml.safe_dump({"type": kind, "attributes": attributes}))

    @contextmanager
    def context(self, name: str, release: str = RELEASE) -> Iterator[ReleaseContext]:
        """Open a set's context in this process, as an asset does."""
        with release_context(self._settings(name), release, *self._resources()) as context:
            yield context

    @contextmanager
    def planned(self, name: str, release: str = RELEASE) -> Iterator[PlannedContext]:
        """Open a set's context in this process, as the asset that copies cells does."""
        with planned_context(self._settings(name), release, *self._resources()) as context:
            yield context

    def _settings(self, name: str) -> SetSettings:
        attributes = yaml.safe_load((self.folder / "sets" / name / "defs.yaml").read_text())["attributes"]
        return EmbeddingSet(**attributes).placed()

    def _resources(self) -> tuple[CensusResource, StoreResource]:
        # Not by changing this process's environment: TileDB's threads read it.
        store = store_resource(self.env).model_copy(update={"cache": str(self.folder / "cache")})
        return census_resource(self.env), store

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run `python -m census_tf_dagster` with these arguments."""
        return run_module("census_tf_dagster", arguments, self.folder, self.env)

    def materialize(self, asset: str, partition: str, config: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run `dagster asset materialize` as the README does."""
        extra = ["--config-json", config] if config else []
        return run_module("dagster", [*self._materialize_arguments(asset, partition), *extra], self.folder, self.env)

    def start_materialize(self, asset: str, partition: str) -> WarmProcess:
        """Start `dagster asset materialize` and return at once."""
        return WarmProcess("dagster", self._materialize_arguments(asset, partition), self.folder, self.env)

    @staticmethod
    def _materialize_arguments(asset: str, partition: str) -> list[str]:
        module = ["-m", "census_tf_dagster.definitions"]
        return ["asset", "materialize", *module, "--select", asset, "--partition", partition]

    def materialize_all(self, name: str, shards: int = 4) -> None:
        """Materialize the plan, all shards and the array. Each must succeed."""
        steps = [("obs_id_plan", RELEASE)]
        steps += [("shard_embeddings", f"{RELEASE}|{shard}") for shard in range(shards)]
        steps += [("embeddings_array", RELEASE)]
        for asset, partition in steps:
            done = self.materialize(f"{name}/{asset}", partition)
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]

    def array(self, name: str, release: str = RELEASE) -> Path:
        """Return the path of a set's only array of a release or file."""
        (found,) = (self.folder / "store" / name / release).glob("*/embeddings")
        return found
