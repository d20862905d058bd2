"""A set of files in Dagster: each file has a plan, an approval and a verified array with the values of `embed`."""

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pytest
import tiledbsoma

from census_tf_dagster import embed
from census_tf_dagster.census.cells import Cells
from census_tf_dagster.config.placement import NODE_TAG
from census_tf_dagster.config.retention import Retention
from census_tf_dagster.definitions import build_definitions, load_sets
from census_tf_dagster.io.storage import Storage
from census_tf_dagster.orchestration.metadata import values_of
from census_tf_dagster.orchestration.resources import CensusResource, StoreResource
from census_tf_dagster.own_cells.embed import OwnCells
from census_tf_dagster.pipeline.embed_shard import embed_shard
from census_tf_dagster.pipeline.finish_array import finish_array
from census_tf_dagster.pipeline.plan_release import make_plan
from census_tf_dagster.store.inventory import inspect_store
from census_tf_dagster.store.prune import candidates
from tests.support.builders import tiny
from tests.support.moto_servers import REGION, upload
from tests.support.own_files import ASSAYS, checkpoint, some_cells
from tests.support.project import BOUND, RELEASE, Project, UpstreamCommand, read_array

__all__ = ["checkpoint"]

pytestmark = pytest.mark.filterwarnings("ignore:.* have an assay that the checkpoint does not know:UserWarning")
CELLS = "cells.h5ad"
RULES = {"schema", "shape", "cells", "features", "values", "obs_ids"}


class Lab:
    """A deployment with one set of files, run in this process."""

    def __init__(self, project: Project, instance: dg.DagsterInstance) -> None:
        self.project, self.instance = project, instance
        self.folder = project.folder / "lab"
        self.s3: dict[str, str] = {}
        self.folder.mkdir(exist_ok=True)

    def run(
        self, asset: str, name: str = CELLS, config: dict[str, Any] | None = None, **tags: str
    ) -> dg.ExecuteInProcessResult:
        defs = build_definitions(
            load_sets(self.project.folder / "sets"),
            CensusResource(location=self.project.env["CENSUS_TF_CENSUS"]),
            StoreResource(
                location=self.project.env["CENSUS_TF_STORE"], cache=str(self.project.folder / "cache"), **self.s3
            ),
        )
        self.instance.add_dynamic_partitions("lab_files", [name])
        return defs.resolve_implicit_global_asset_job_def().execute_in_process(
            partition_key=name,
            asset_selection=[dg.AssetKey(["lab", one]) for one in asset.split()],
            instance=self.instance,
            run_config={"ops": {f"lab__{asset}": {"config": config}}} if config else None,
            raise_on_error=False,
            tags=tags,
        )

    def everything(self, name: str = CELLS) -> dict[str, Any]:
        for asset in ("obs_id_plan", "approval"):
            assert self.run(asset, name).success
        return shown(self.run("embeddings_array", name), "embeddings_array")


def shown(result: dg.ExecuteInProcessResult, asset: str) -> dict[str, Any]:
    assert result.success, failure(result)
    (event,) = result.asset_materializations_for_node(f"lab__{asset}")
    return values_of(event.metadata)


def failure(result: dg.ExecuteInProcessResult) -> str:
    (event,) = [event for event in result.all_events if event.event_type_value == "STEP_FAILURE"]
    data = event.step_failure_data
    return str(data.user_failure_data.description if data.user_failure_data else data.error)


@pytest.fixture
def lab(project: Project, checkpoint: Path) -> Iterator[Lab]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield Lab(project, instance)


def test_the_array_has_the_values_of_embed(lab: Lab, tmp_path: Path, upstream_command: UpstreamCommand) -> None:
    lab.project.add_file_set("lab", gene_order="vocabulary")
    adata = some_cells(200)
    adata.X[7, 1] = -1
    adata.X[9, 1] = 0.5
    adata.write_h5ad(lab.folder / CELLS)
    planned = shown(lab.run("obs_id_plan"), "obs_id_plan")
    assert (planned["cells"], planned["genes"], planned["gene_column"]) == (200, 80, "ensembl_id")
    assert "have an assay that the checkpoint does not know" in planned["warnings"]
    assert lab.run("approval").success
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{upstream_command.command.parent}{os.pathsep}{os.environ['PATH']}")
        result = lab.run("embeddings_array")
    figures = shown(result, "embeddings_array")
    assert (figures["cells"], figures["cells_with_embedding"], figures["cells_set_aside"]) == (200, 199, 1)
    assert figures["set_aside"] == ["joinid 7: X holds -1.0, which is not a count"]
    assert figures["cells_fractional"] == 1
    # The estimate is made from the first cells, here from all.
    assert abs(planned["tokens"] - figures["tokens_computed"]) < 0.1 * planned["tokens"]
    checks = {one.check_name: one for one in result.get_asset_check_evaluations()}
    assert set(checks) == RULES | {"same_as_upstream"}
    assert all(one.passed for one in checks.values())
    assert "8 cells of the array were compared" in checks["same_as_upstream"].description

    stored = read_array(lab.project.array("lab", CELLS), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        ours = embed(adata, lab.project.checkpoint, gene_order="vocabulary", precision="fp32", device="cpu")
    there = np.flatnonzero(np.isfinite(ours).all(axis=1))
    assert np.array_equal(stored.ids, there)
    assert np.array_equal(stored.values, ours[there])
    assert stored.shape == (200, 16)
    identity = json.loads(stored.metadata["census_tf_identity"])
    assert (identity["gene_order"], identity["matrix"]) == ("vocabulary", "X")


def test_all_assets_of_a_file_in_one_run(lab: Lab) -> None:
    lab.project.add_file_set("lab")
    some_cells().write_h5ad(lab.folder / CELLS)
    done = lab.run("obs_id_plan approval embeddings_array")
    assert shown(done, "embeddings_array")["cells_with_embedding"] == 60


def test_a_second_run_computes_nothing_and_mends_damage(lab: Lab, tmp_path: Path) -> None:
    lab.project.add_file_set("lab")
    some_cells(200).write_h5ad(lab.folder / CELLS)
    assert lab.everything()["cells_computed"] == 200
    array = lab.project.array("lab", CELLS)
    whole = read_array(array, tmp_path)
    assert shown(lab.run("embeddings_array"), "embeddings_array")["cells_computed"] == 0
    shutil.rmtree(sorted(array.glob("__fragments/*"))[1])
    figures = shown(lab.run("embeddings_array"), "embeddings_array")
    assert 0 < figures["cells_computed"] < 200
    again = read_array(array, tmp_path)
    assert np.array_equal(again.ids, whole.ids)
    assert np.array_equal(again.values, whole.values)


def test_a_file_that_has_changed_gets_another_array(lab: Lab, tmp_path: Path) -> None:
    lab.project.add_file_set("lab")
    some_cells().write_h5ad(lab.folder / CELLS)
    lab.everything()
    before = lab.project.array("lab", CELLS)
    some_cells(seed=1).write_h5ad(lab.folder / CELLS)
    # The plan belongs to the earlier content.
    assert "there is no plan at" in failure(lab.run("embeddings_array"))
    assert lab.everything()["cells_computed"] == 60
    (other,) = {*(lab.project.folder / "store" / "lab" / CELLS).glob("*/embeddings")} - {before}
    assert not np.array_equal(read_array(other, tmp_path).values, read_array(before, tmp_path).values)


def test_a_file_that_changes_while_it_is_embedded_is_not_finished(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.project.add_file_set("lab")
    file = lab.folder / CELLS
    some_cells().write_h5ad(file)
    assert lab.run("obs_id_plan approval").success
    read = OwnCells.read

    def changing(own: OwnCells, positions: np.ndarray) -> Cells:
        os.utime(file)
        return read(own, positions)

    monkeypatch.setattr(OwnCells, "read", changing)
    assert "changed while it was read" in failure(lab.run("embeddings_array"))
    monkeypatch.setattr(OwnCells, "read", read)
    # The plan was for the file as it was.
    assert "there is no plan at" in failure(lab.run("embeddings_array"))
    assert lab.everything()["cells_with_embedding"] == 60


def test_bad_files_are_refused_when_they_are_planned(lab: Lab) -> None:
    lab.project.add_file_set("lab")
    adata = some_cells()
    counts = adata.X.toarray()
    adata.X = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    adata.write_h5ad(lab.folder / CELLS)
    assert "holds log-normalised values" in failure(lab.run("obs_id_plan"))
    (lab.folder / "text.h5ad").write_text("no cells")
    assert "text.h5ad cannot be read as HDF5" in failure(lab.run("obs_id_plan", "text.h5ad"))
    assert "missing.h5ad does not exist" in failure(lab.run("obs_id_plan", "missing.h5ad"))
    assert not (lab.project.folder / "store").exists()


def test_commands_take_a_file_in_place_of_a_release(lab: Lab, upstream_command: UpstreamCommand) -> None:
    lab.project.add_file_set("lab")
    adata = some_cells(200)
    adata.X[7, 1] = -1
    adata.write_h5ad(lab.folder / CELLS)
    command = ["canary", "lab", CELLS, "--cells", "40", "--upstream", str(upstream_command.command), "--json"]
    tried = lab.project.command(*command)
    assert tried.returncode == 0, tried.stderr
    result = json.loads(tried.stdout)
    assert (result["cells"], result["release_cells"]) == (40, 200)
    assert result["worst_cell"] < BOUND
    # The plan estimates the cost at the rate that the canary measured.
    assert "measured: the canary of this set" in shown(lab.run("obs_id_plan"), "obs_id_plan")["rate"]
    early = lab.project.command("verify", "lab", CELLS)
    assert early.returncode == 1
    assert "1 of 1 shards have not finished" in early.stderr
    assert early.stderr.rstrip().endswith("Materialize these partitions first: embeddings_array of cells.h5ad.")
    lab.everything()
    verified = lab.project.command("verify", "lab", CELLS, "--full")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert set(re.findall(r"^  (\w+) +kept$", verified.stdout, re.MULTILINE)) == RULES | {"publication"}
    dry = lab.project.command("launch", "lab", CELLS, "--dry-run")
    assert (dry.returncode, dry.stdout) == (1, "")
    assert "lab is a set of files; expected a set of releases. To see what a file costs, materialize" in dry.stderr
    checked = lab.project.command("check")
    assert "1 set without a mistake: lab" in checked.stdout

    # As docs/embed.md reads it.
    with tiledbsoma.open(str(lab.project.array("lab", CELLS))) as array:
        found = array.read().tables().concat()
        embeddings = np.full(array.shape, np.nan, np.float32)
    embeddings[found["soma_dim_0"], found["soma_dim_1"]] = found["soma_data"]
    assert np.flatnonzero(np.isnan(embeddings).any(axis=1)).tolist() == [7]
    with pytest.warns(UserWarning, match="cannot be embedded"):
        ours = embed(adata, lab.project.checkpoint, precision="fp32", device="cpu")
    assert np.array_equal(embeddings, ours, equal_nan=True)


def test_retention_keeps_the_arrays_of_files(lab: Lab) -> None:
    lab.project.add_file_set("lab")
    for name in ("a.h5ad", "b.h5ad", "c.h5ad"):
        some_cells().write_h5ad(lab.folder / name)
        lab.everything(name)
    tiny(lab.project, cells=50, shards=1)
    with lab.project.context("tiny") as context:
        make_plan(context)
    store, storage = str(lab.project.folder / "store"), Storage()
    found = {(one.set, one.release): one for one in inspect_store(store, storage)}
    assert {name: one.of_file for (name, _), one in found.items()} == {"lab": True, "tiny": False}
    assert all(one.state == "verified" for one in found.values() if one.of_file)
    for path in Path(store).rglob("*"):
        os.utime(path, (1e9, 1e9))
    assert not candidates(store, storage, Retention(policy="expire", releases=1, days=1))


AUTOMATIC = {"dagster/from_automation_condition": "true", "dagster/sensor_name": "lab_auto_start"}


def test_a_file_above_the_budget_waits_for_a_person(lab: Lab) -> None:
    prices = {"gpus": 0, "gpu_type": "L40S", "usd_per_gpu_hour": 1e9}
    lab.project.add_file_set("lab", auto_start={"budget": 0.01}, placement=prices)
    some_cells().write_h5ad(lab.folder / CELLS)
    assert lab.run("obs_id_plan").success
    waits = lab.run("approval", **AUTOMATIC)
    assert waits.success
    assert not waits.asset_materializations_for_node("lab__approval")
    (observed,) = lab.instance.fetch_observations(dg.AssetKey(["lab", "approval"]), limit=5).records
    question = observed.asset_observation.description
    assert question.startswith(f"lab {CELLS} waits for your approval: it costs ")
    assert "above the budget of 0.01 USD a file" in question
    assert "census-tf-dagster approve" not in question
    refused = failure(lab.run("embeddings_array", **AUTOMATIC))
    assert f"To approve and continue, materialize lab/approval of {CELLS} in the web interface." in refused
    assert lab.run("approval").success
    assert shown(lab.run("embeddings_array", **AUTOMATIC), "embeddings_array")["usd"] > 0


def test_the_run_is_placed_as_a_shard_is(lab: Lab) -> None:
    kubernetes = {"image": "worker", "nodes": {"on_demand": {"node_selector": {"pool": "gpu"}}}}
    lab.project.add_file_set("lab", device="cuda", placement={"gpus": 1, "kubernetes": kubernetes})
    loaded = load_sets(lab.project.folder / "sets")
    tags = {asset.key.path[-1]: asset.op.tags for asset in loaded.assets if isinstance(asset, dg.AssetsDefinition)}
    assert tags["embeddings_array"][NODE_TAG] == "gpu"
    assert json.loads(tags["embeddings_array"]["dagster-k8s/config"])["pod_spec_config"]["node_selector"] == {
        "pool": "gpu"
    }
    assert not any(NODE_TAG in tags[name] for name in ("obs_id_plan", "approval"))
    some_cells().write_h5ad(lab.folder / CELLS)
    # This machine has no GPU.
    assert "GPU" in failure(lab.run("embeddings_array"))


def test_beside_the_array_of_a_release(lab: Lab) -> None:
    tiny(lab.project, cells=50, shards=1, compute_precision="bf16", storage_precision="bfloat16")
    with lab.project.context("tiny") as context:
        make_plan(context)
        embed_shard(context, 0)
        finish_array(context)
        array = context.folder.array
    lab.project.add_file_set("lab", like=array)
    adata = some_cells()
    adata.obs["assay"] = ASSAYS[0]
    adata.write_h5ad(lab.folder / CELLS)
    refused = failure(lab.run("obs_id_plan"))
    assert "the set lab has compute_precision: fp32, storage_precision: float32; the array" in refused
    assert "was made with compute_precision: bf16, storage_precision: bfloat16. Write the array's values" in refused
    assert RELEASE in refused


def test_files_on_s3(lab: Lab, s3: str, tmp_path: Path) -> None:
    some_cells().write_h5ad(lab.folder / CELLS)
    upload(lab.folder, s3, "lab-files", "new")
    lab.project.add_file_set("lab", files="s3://lab-files/new")
    lab.s3 = {"s3_region": REGION, "s3_endpoint": s3}
    assert lab.everything()["cells_with_embedding"] == 60
    ours = embed(lab.folder / CELLS, lab.project.checkpoint, precision="fp32", device="cpu")
    assert np.array_equal(read_array(lab.project.array("lab", CELLS), tmp_path).values, ours)
    assert not [path for path in (lab.project.folder / "cache").glob("files/*") if path.is_dir()]


def test_a_killed_worker_loses_one_megabatch(lab: Lab, tmp_path: Path) -> None:
    lab.project.add_file_set("lab")
    adata = some_cells(4000)
    adata.obs["assay"] = ASSAYS[0]
    adata.write_h5ad(lab.folder / CELLS)
    project = lab.project
    with dg.DagsterInstance.from_config(project.env["DAGSTER_HOME"]) as instance:
        instance.add_dynamic_partitions("lab_files", [CELLS])
    for asset in ("obs_id_plan", "approval"):
        assert lab.run(asset).success
    array = project.array("lab", CELLS)
    kills = 0
    for committed in (3, 9):
        with project.start_materialize("lab/embeddings_array", CELLS) as worker:
            while worker.poll() is None and len(list(array.glob("__commits/*"))) < committed:
                pass
            worker.kill()
            kills += worker.wait() == -9
    assert kills == 2
    left = len(list(array.glob("__commits/*")))
    figures = shown(lab.run("embeddings_array"), "embeddings_array")
    assert figures["megabatches_computed"] <= 20 - left + 1
    ours = embed(adata, project.checkpoint, precision="fp32", device="cpu")
    stored = read_array(array, tmp_path)
    assert np.array_equal(stored.values, ours)
