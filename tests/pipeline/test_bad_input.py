"""Bad input is refused before a model is loaded or a byte written, with one error that says what to do."""

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import tiledb
import tiledbsoma
import torch

from census_tf_dagster.census.cells import read_cells
from census_tf_dagster.census.plan import read_plan
from census_tf_dagster.demo.checkpoint import build_checkpoint
from census_tf_dagster.demo.synthetic import KNOWN_ASSAYS
from census_tf_dagster.errors import UserError
from census_tf_dagster.inference import engine
from census_tf_dagster.orchestration.resources import CensusResource
from census_tf_dagster.pipeline.context import ReleaseContext
from census_tf_dagster.pipeline.embed_shard import embed_shard
from census_tf_dagster.pipeline.plan_release import make_plan
from census_tf_dagster.store.array import EmbeddingsArray
from tests.support.builders import tiny
from tests.support.project import RELEASE, Project


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("census_tf_dagster.inference.engine.load_model", loaded)
    assert engine.load_model is loaded


def plan_is_refused(project: Project, message: str, name: str = "tiny", release: str = RELEASE) -> None:
    store = project.folder / "store"
    before = snapshot(store)
    with pytest.raises(UserError, match=message), project.context(name, release) as context:
        make_plan(context)
    assert snapshot(store) == before


pytestmark = pytest.mark.usefixtures("no_model")


def edit_counts(project: Project, value: float) -> None:
    """Replace the first cell's counts, with one of them changed."""
    uri = counts_folder(project)
    with tiledbsoma.open(str(uri)) as array:
        table = array.read().tables().concat()
    for folder in ("__fragments", "__commits"):
        shutil.rmtree(uri / folder)
    values = table["soma_data"].to_numpy().copy()
    values[np.flatnonzero(table["soma_dim_0"].to_numpy() == 0)[3]] = value
    column = table.column_names.index("soma_data")
    with tiledbsoma.open(str(uri), "w") as array:
        array.write(table.set_column(column, table.schema.field(column), [values]))


@pytest.mark.parametrize(("value", "whole"), [(0.5, True), (-100.0, False), (np.nan, False), (np.inf, False)])
def test_a_cell_with_an_impossible_count_is_set_aside(project: Project, value: float, whole: bool) -> None:
    tiny(project)
    edit_counts(project, value)
    with project.context("tiny") as context:
        cells = read_cells(context.release, np.arange(4), whole_counts=whole)
    what = "whole number" if whole else "count"
    assert cells.set_aside == {0: f"X/raw holds {np.float32(value)!s}, which is not a {what}"}
    assert cells.joinids.tolist() == [1, 2, 3]
    assert len(cells.indptr) == 4
    assert cells.indptr[-1] == len(cells.values) == len(cells.columns)


def test_fractions_are_taken_as_they_are(project: Project) -> None:
    tiny(project)
    edit_counts(project, 0.5)
    with project.context("tiny") as context:
        cells = read_cells(context.release, np.arange(4))
    assert (cells.set_aside, cells.fractional) == ({}, 1)
    assert cells.values[: cells.indptr[1]].min() == 0.5


def counts_folder(project: Project) -> Path:
    return project.census / "census_data" / "homo_sapiens" / "ms" / "RNA" / "X" / "raw"


def test_a_census_copied_in_part(project: Project) -> None:
    tiny(project)
    for folder in ("__fragments", "__commits"):
        shutil.rmtree(counts_folder(project) / folder)
    plan_is_refused(project, r"50 of 50 sampled cells .* joinid 0: X/raw holds 0 counts, and obs\.nnz states \d+")


def test_cells_whose_counts_were_written_twice(project: Project) -> None:
    tiny(project)
    with tiledbsoma.open(str(counts_folder(project))) as array:
        table = array.read(coords=(slice(0, 3),)).tables().concat()
    with tiledbsoma.open(str(counts_folder(project)), "w") as array:
        array.write(table)
    with project.context("tiny") as context:
        cells = read_cells(context.release, np.arange(6))
    assert cells.joinids.tolist() == [4, 5]
    assert all(re.fullmatch(r"X/raw holds \d+ counts, and obs.nnz states \d+", why) for why in cells.set_aside.values())


def test_an_obs_without_the_checkpoints_column(project: Project) -> None:
    tiny(project)
    config = project.checkpoint / "config.json"
    config.write_text(config.read_text().replace('"aux_cols": "assay"', '"aux_cols": "platform"'))
    (project.checkpoint / "vocabs" / "assay_vocab.json").rename(project.checkpoint / "vocabs" / "platform_vocab.json")
    weights = project.checkpoint / "model_weights.pt"
    state = torch.load(weights, weights_only=True)
    state["aux_embeddings.platform.weight"] = state.pop("aux_embeddings.assay.weight")
    torch.save(state, weights)
    plan_is_refused(project, r"lacks the column 'platform'; expected it, because the checkpoint .* conditions on it")


def rewrite_var(project: Project, edit: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    uri = str(project.census / "census_data" / "homo_sapiens" / "ms" / "RNA" / "var")
    with tiledbsoma.open(uri) as var:
        frame = var.read().concat().to_pandas()
        domain = var.domain
    shutil.rmtree(uri)
    table = pa.Table.from_pandas(edit(frame), preserve_index=False)
    with tiledbsoma.DataFrame.create(uri, schema=table.schema, domain=domain) as created:
        created.write(table)


def test_duplicate_gene_ids(project: Project) -> None:
    tiny(project)

    def versions(frame: pd.DataFrame) -> pd.DataFrame:
        frame.loc[9, "feature_id"] = frame.loc[8, "feature_id"] + ".2"
        return frame

    rewrite_var(project, versions)
    plan_is_refused(project, r"1 gene ids that the checkpoint knows occur more than once after .* e\.g\. \['ENSG0+8'\]")


def test_a_census_without_a_needed_obs_column(project: Project) -> None:
    tiny(project)
    uri = str(project.census / "census_data" / "homo_sapiens" / "obs")
    evolution = tiledb.ArraySchemaEvolution()
    evolution.drop_attribute("is_primary_data")
    evolution.array_evolve(uri)
    plan_is_refused(project, r"obs of homo_sapiens .* lacks the columns is_primary_data")


def test_something_that_is_no_census(project: Project) -> None:
    tiny(project)
    shutil.rmtree(project.census)
    with tiledbsoma.Collection.create(str(project.census)):
        pass
    plan_is_refused(project, "is not a Census .*; expected census_data and census_info in it")


def test_a_folder_that_is_no_soma_at_all(project: Project) -> None:
    tiny(project)
    shutil.rmtree(project.census)
    project.census.mkdir()
    plan_is_refused(project, "there is no Census at")


def test_unknown_release(project: Project) -> None:
    tiny(project)
    plan_is_refused(project, "release '2031-01-01' is unknown: there is no Census at", release="2031-01-01")


def test_a_census_location_without_a_place_for_the_release() -> None:
    with pytest.raises(UserError, match=r"expected 'public', or a location that contains '\{release\}'"):
        CensusResource(location="/data/census").uri(RELEASE)


def test_an_organism_that_the_checkpoint_hardly_knows(project: Project) -> None:
    tiny(project)
    build_checkpoint(project.folder / "other", {"x": ["ENSG00000000003", "ENSMUSG00000000001"]}, KNOWN_ASSAYS)
    project.add_set("hardly", organism="homo_sapiens", checkpoint=str(project.folder / "other"))
    plan_is_refused(
        project,
        r"knows \d+\.\d% of the genes that cells of homo_sapiens express \(1 of 120 genes.*set `pretrained_embeddings`",
        name="hardly",
    )


def test_a_checkpoint_that_is_not_there(project: Project) -> None:
    tiny(project)
    project.add_set("lost", organism="homo_sapiens", checkpoint=str(project.folder / "nowhere"))
    plan_is_refused(project, r"nowhere does not exist; expected a checkpoint", name="lost")


def test_weights_that_the_configuration_does_not_account_for(project: Project) -> None:
    tiny(project)
    config = project.checkpoint / "config.json"
    config.write_text(config.read_text().replace('"num_layers": 2', '"num_layers": 1'))
    plan_is_refused(project, r"it has transformer_encoder.encoder_layers.1.*which such a model does not have")


def test_weights_that_were_damaged_after_planning(project: Project) -> None:
    tiny(project)
    with project.context("tiny") as context:
        make_plan(context)
    weights = project.checkpoint / "model_weights.pt"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with (
        pytest.raises(UserError, match=r"model_weights.pt is damaged: .* Get model_weights.pt again"),
        project.context("tiny") as context,
    ):
        embed_shard(context, 0)


def test_an_array_location_that_holds_something_else(project: Project) -> None:
    tiny(project)
    with project.context("tiny") as context:
        tiledbsoma.Collection.create(context.folder.array).close()
    plan_is_refused(project, r"embeddings holds .*; expected a SparseNDArray")


@pytest.mark.parametrize(("rows", "message"), [(200, "so this project did not make it"), (5, "has 5 rows; expected")])
def test_an_array_that_is_not_ours(project: Project, rows: int, message: str) -> None:
    tiny(project)
    with project.context("tiny") as context:
        Path(context.folder.root).mkdir(parents=True)
        with tiledbsoma.SparseNDArray.create(context.folder.array, type=pa.float32(), shape=(rows, 16)) as array:
            array.write(pa.table({"soma_dim_0": [0], "soma_dim_1": [0], "soma_data": pa.array([1.0], pa.float32())}))
    plan_is_refused(project, message)


def test_a_creation_that_was_cut_short_is_taken_up(project: Project) -> None:
    tiny(project)
    with project.context("tiny") as context:
        make_plan(context)
        with tiledbsoma.open(context.folder.array, "w") as array:
            del array.metadata["census_tf_identity"]
        assert make_plan(context).totals.cells == 200
        read_plan(context.store, context.folder.plan)


ARRAY_FOLDERS = (
    "__schema",
    "__schema/__enumerations",
    "__commits",
    "__fragments",
    "__meta",
    "__fragment_meta",
    "__labels",
)
"""Entries that TileDB makes in an array's folder, in this order, before it writes the schema."""


@pytest.mark.parametrize("made", range(len(ARRAY_FOLDERS) + 1))
def test_a_creation_that_was_killed_before_the_schema_is_taken_up(project: Project, made: int) -> None:
    tiny(project)
    with project.context("tiny") as context:
        for folder in ("", *ARRAY_FOLDERS[:made]):
            (Path(context.folder.array) / folder).mkdir(parents=True)
        with pytest.raises(UserError, match=r"there is no array at .*: materialize obs_id_plan"):
            EmbeddingsArray.open(context.folder.array, context.store, context.identity)
        make_plan(context)
        array = EmbeddingsArray.open(context.folder.array, context.store, context.identity)
        array.write(np.array([7]), np.ones((1, 16), np.float32))
        assert array.joinids_between(0, 199).tolist() == [7]


def test_a_folder_with_a_file_is_refused_and_left_alone(project: Project) -> None:
    tiny(project)
    with project.context("tiny") as context:
        there = Path(context.folder.array)
        for folder in ARRAY_FOLDERS:
            (there / folder).mkdir(parents=True)
        (there / "__labels" / "empty").touch()
        before = sorted(there.rglob("*"))
    plan_is_refused(project, r"embeddings holds .*; expected a SparseNDArray")
    assert sorted(there.rglob("*")) == before


def test_a_store_that_cannot_be_written(project: Project) -> None:
    tiny(project)
    (project.folder / "file").write_text("no folder")
    project.env["CENSUS_TF_STORE"] = str(project.folder / "file" / "store")
    with pytest.raises(UserError, match="the store cannot be written at"), project.context("tiny") as context:
        make_plan(context)
    assert (project.folder / "file").read_text() == "no folder"


def test_a_shard_beyond_the_plan(project: Project) -> None:
    tiny(project)
    with project.context("tiny") as context:
        make_plan(context)
        with pytest.raises(
            UserError, match=r"shard 9 is not in the plan; expected a shard from 0 to 3\. If you changed .*`shards`"
        ):
            embed_shard(context, 9)


@pytest.mark.parametrize("kind", ["megabatches", "obs_ids"])
def test_a_plan_that_is_damaged(project: Project, kind: str) -> None:
    tiny(project)
    with project.context("tiny") as context:
        make_plan(context)
        plan = read_plan(context.store, context.folder.plan)
        file = Path(context.folder.plan) / f"{plan.totals.plan}.{kind}.parquet"
        file.write_bytes(b"PAR1 cut")
        before = snapshot(Path(context.folder.root))
        with pytest.raises(UserError, match=r"is damaged .*materialize obs_id_plan again"):
            plan_and_ids(context)
        assert snapshot(Path(context.folder.root)) == before
        make_plan(context)
        plan_and_ids(context)


def plan_and_ids(context: ReleaseContext) -> None:
    plan = read_plan(context.store, context.folder.plan)
    plan.read_ids(context.store, plan.shard(0))


def test_planned_ids_that_disagree_with_the_index(project: Project) -> None:
    tiny(project)
    with project.context("tiny") as context:
        make_plan(context)
        plan = read_plan(context.store, context.folder.plan)
        swapped = replace(
            plan, megabatches=(replace(plan.megabatches[0], ids=plan.megabatches[1].ids), *plan.megabatches[1:])
        )
        with pytest.raises(UserError, match="megabatch 0 holds other ids than the plan"):
            swapped.read_ids(context.store, swapped.megabatches[:1])


def test_no_gpu_where_the_set_asks_for_one(project: Project) -> None:
    tiny(project, device="cuda")
    with project.context("tiny") as context:
        make_plan(context)
        before = snapshot(Path(context.folder.root))
        with pytest.raises(UserError, match="has `device: cuda`, but this machine has no GPU"):
            embed_shard(context, 0)
        assert snapshot(Path(context.folder.root)) == before
