"""Runs the demo: builds a small Census and checkpoint, and lets Dagster materialize everything up to the arrays.

Writing the data belongs in `census` and `checkpoint`.
"""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import tiledb
import tiledbsoma

from census_tf_dagster.config.dagster_names import APPROVAL, ARRAY, PLAN, REUSED, SHARDS
from census_tf_dagster.definitions import load_sets
from census_tf_dagster.demo.census import Organism, build_census
from census_tf_dagster.demo.checkpoint import build_checkpoint, build_pretrained_embeddings
from census_tf_dagster.demo.synthetic import UNLISTED_ASSAY, organism_from_h5ad, synthetic_organism
from census_tf_dagster.errors import UserError
from census_tf_dagster.io.worker_process import WorkerProcess
from census_tf_dagster.orchestration.metadata import values_of
from census_tf_dagster.orchestration.partitions import RELEASES
from census_tf_dagster.orchestration.resources import CensusResource, StoreResource

FOLDER = Path("demo-data")
RELEASE = "2025-11-08"
GENES = 20_000
ESM_DIM = 96
INSTANCE = """telemetry:
  enabled: false
# No newsletter over the first page.
nux:
  enabled: false
concurrency:
  runs:
    # Shards of one machine share its devices.
    max_concurrent_runs: 1
# A run fails if it does not start, or does not end when it is cancelled. The sensor lost_runs ends runs whose worker is
# gone.
run_monitoring:
  enabled: true
  start_timeout_seconds: 600
# Runs are retried if their worker is lost. An error that an asset raises needs a person.
run_retries:
  enabled: true
  max_retries: 3
  retry_on_asset_or_op_failure: false
"""
"""The Dagster instance of one machine."""
SETS_FOLDER = Path(__file__).parent.parent / "defs"


@dataclass(frozen=True)
class DemoOrganism:
    """One organism of the demo, with its number of synthetic cells if the user gives no h5ad file."""

    label: str
    gene_prefix: str
    cells: int
    in_vocabulary: bool


ORGANISMS = {
    "homo_sapiens": DemoOrganism("Homo sapiens", "ENSG", 400, in_vocabulary=True),
    "mus_musculus": DemoOrganism("Mus musculus", "ENSMUSG", 300, in_vocabulary=True),
    "callithrix_jacchus": DemoOrganism("Callithrix jacchus", "ENSCJAG", 100, in_vocabulary=False),
}


def run_demo(h5ads: Sequence[str], *, data_only: bool) -> None:
    """Build the demo's data in ``demo-data``; unless `data_only`, run the demo sets on it.

    Parameters
    ----------
    h5ads
        ``organism=file`` for each organism whose cells come from a file.
    data_only
        Whether to stop before Dagster runs.

    Raises
    ------
    UserError
        When a demo exists already, or an h5ad argument is invalid.
    """
    started = time.monotonic()
    files = _parse_h5ads(h5ads)
    if (FOLDER / "census").exists():
        raise UserError(
            f"{FOLDER}/census exists already; expected no demo. To build the demo anew, remove the folder {FOLDER}."
        )
    organisms = [
        organism_from_h5ad(files[name], name, kind.label)
        if name in files
        else synthetic_organism(name, kind.label, kind.cells, GENES, kind.gene_prefix, seed=seed)
        for seed, (name, kind) in enumerate(ORGANISMS.items())
    ]
    try:
        build_data(organisms)
        _write_instance(FOLDER / "dagster_home")
    except (OSError, tiledb.TileDBError, tiledbsoma.SOMAError) as error:
        raise UserError(
            f"the demo cannot be written below {FOLDER.absolute()} ({error}). Expected a writable folder with 1 GB of "
            "free space: run the demo in one."
        ) from error
    print(f"Built a Census and a checkpoint in {time.monotonic() - started:.0f} s below {FOLDER}/.", flush=True)
    if not data_only:
        _report(_materialize_everything())


def build_data(organisms: Sequence[Organism]) -> None:
    """Write the Census, the checkpoint, and embedding files for species that the checkpoint does not know."""
    build_census(str(FOLDER / "census" / RELEASE), RELEASE, organisms)
    genes = {organism.name: organism.genes["feature_id"].tolist() for organism in organisms}
    assays = {str(assay) for organism in organisms for assay in organism.cells.get("assay", ())}
    build_checkpoint(
        FOLDER / "checkpoint",
        # One gene in twenty is outside the vocabulary, as with the real ones.
        {name: [gene for i, gene in enumerate(ids) if i % 20] for name, ids in genes.items() if _known(name)},
        sorted(assays - {UNLISTED_ASSAY}),
        esm_dim=ESM_DIM,
    )
    (FOLDER / "embeddings").mkdir(parents=True, exist_ok=True)
    for seed, (name, ids) in enumerate(genes.items()):
        if not _known(name):
            build_pretrained_embeddings(FOLDER / "embeddings" / f"{name}_gene.h5", ids, ESM_DIM, seed=seed)


def _known(organism: str) -> bool:
    return ORGANISMS[organism].in_vocabulary


def _parse_h5ads(arguments: Sequence[str]) -> dict[str, Path]:
    files = {}
    for argument in arguments:
        organism, separator, file = argument.partition("=")
        if not separator or organism not in ORGANISMS:
            raise UserError(
                f"--h5ad is {argument!r}; expected ORGANISM=FILE: give one of the organisms {', '.join(ORGANISMS)}."
            )
        if not Path(file).is_file():
            raise UserError(
                f"--h5ad is {argument!r}, but there is no file {file}; expected an AnnData file: correct the path."
            )
        files[organism] = Path(file)
    return files


def _write_instance(home: Path) -> None:
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "dagster.yaml").exists():
        (home / "dagster.yaml").write_text(INSTANCE)


def _materialize_everything() -> list[Mapping[str, Any]]:
    home = Path(os.environ.setdefault("DAGSTER_HOME", str((FOLDER / "dagster_home").absolute())))
    _write_instance(home)
    sets = load_sets(SETS_FOLDER)
    assets = [asset for asset in sets.assets or () if isinstance(asset, dg.AssetsDefinition)]
    resources = {
        "census": CensusResource(location=str(FOLDER / "census" / "{release}")),
        "store": StoreResource(location=str(FOLDER / "store")),
    }
    rows: list[Mapping[str, Any]] = []
    with dg.DagsterInstance.get() as instance:
        instance.add_dynamic_partitions(str(RELEASES.name), [RELEASE])

        def materialize(key: dg.AssetKey, partition: str) -> Mapping[str, Any]:
            result = dg.materialize(
                [*assets, *(sets.asset_checks or ())],
                selection=[key],
                partition_key=partition,
                instance=instance,
                resources=resources,
                tags=WorkerProcess.this("").tags(),
                run_config={"loggers": {"console": {"config": {"log_level": "ERROR"}}}},
            )
            return values_of(result.asset_materializations_for_node(key.to_python_identifier())[0].metadata)

        for name in sorted({asset.key.path[0] for asset in assets}):
            started = time.monotonic()
            plan = materialize(dg.AssetKey([name, PLAN]), RELEASE)
            print(f"{name}: planned {plan['cells']} cells in {plan['shards']} shards", flush=True)
            materialize(dg.AssetKey([name, APPROVAL]), RELEASE)
            for shard in range(plan["shards"]):
                done = materialize(dg.AssetKey([name, SHARDS]), f"{RELEASE}|{shard}")
                print(f"{name}: shard {shard} has {done['cells']} cells", flush=True)
                if (copies := dg.AssetKey([name, REUSED])) in {asset.key for asset in assets}:
                    done = materialize(copies, f"{RELEASE}|{shard}")
                    print(f"{name}: shard {shard} has {done['cells']} copied cells", flush=True)
            array = materialize(dg.AssetKey([name, ARRAY]), RELEASE)
            rows.append({**array, "set": name, "seconds": time.monotonic() - started})
    return rows


def _report(rows: Sequence[Mapping[str, Any]]) -> None:
    print("\nset              cells  features  seconds  array")
    for row in rows:
        print(f"{row['set']:<15} {row['cells']:>6} {row['features']:>9} {row['seconds']:>8.0f}  {row['array']}")
    print(
        "\nEvery planned cell is in its array exactly once, with all its values, all finite (read back and verified).\n"
        "The checkpoint's weights are RANDOM: these embeddings mean nothing biologically.\n\n"
        f"Look around:  DAGSTER_HOME={os.environ['DAGSTER_HOME']} {Path(sys.executable).parent}/dagster dev\n"
        "Read them:    import tiledbsoma\n"
        f"              array = tiledbsoma.open({rows[0]['array']!r})\n"
        "              array.read((slice(0, 9),)).tables().concat()"
    )
