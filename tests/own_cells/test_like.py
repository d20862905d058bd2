"""Own cells that are embedded like an array have the array's values, and can stand beside it."""

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest

from census_tf_dagster import embed
from census_tf_dagster.demo.checkpoint import build_checkpoint
from census_tf_dagster.errors import UserError
from census_tf_dagster.pipeline.embed_shard import embed_shard
from census_tf_dagster.pipeline.finish_array import finish_array
from census_tf_dagster.pipeline.plan_release import make_plan
from tests.support.builders import tiny
from tests.support.project import BOUND, Project, read_array, relative_errors

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def array_and_cells(project: Project, **settings: Any) -> tuple[str, anndata.AnnData]:
    """Embed a release; return the array, and its cells as a lab might have them: other gene order, other genes too."""
    organisms = []
    tiny(project, change=organisms.append, cells=50, shards=1, **settings)
    with project.context("tiny") as context:
        make_plan(context)
        embed_shard(context, 0)
        finish_array(context)
        array = context.folder.array
    (organism,) = organisms
    genes = organism.genes["feature_id"].astype(str).tolist()
    obs = pd.DataFrame({"assay": organism.cells["assay"].astype(str).to_numpy()}, [f"lab-{i}" for i in range(50)])
    cells = anndata.AnnData(organism.counts.copy(), obs, pd.DataFrame({"gene_ids": genes}, index=genes))
    order = np.random.default_rng(0).permutation(len(genes))
    return array, cells[:, order].copy()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CENSUS_TF_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("gene_order", ["census", "vocabulary"])
def test_the_same_cells_have_the_same_values(project: Project, tmp_path: Path, gene_order: str) -> None:
    array, cells = array_and_cells(project, gene_order=gene_order)
    stored = read_array(array, tmp_path)
    ours = embed(cells, project.checkpoint, like=array)
    assert relative_errors(ours, stored.values).max() <= BOUND
    # Without it, the order of the file is another one.
    assert relative_errors(embed(cells, project.checkpoint), stored.values).max() > 1e-3


def test_precision_and_rounding_are_the_arrays(project: Project, tmp_path: Path) -> None:
    array, cells = array_and_cells(project, compute_precision="bf16", storage_precision="bfloat16")
    ours = embed(cells, project.checkpoint, like=array, write=True)
    assert not (ours.view(np.uint32) & 0xFFFF).any()
    # A value may be rounded to the next one.
    assert relative_errors(ours, read_array(array, tmp_path).values).max() <= 2**-8
    assert '"compute_precision": "bf16"' in cells.uns["transcriptformer"]
    assert f'"like": "{array}"' in cells.uns["transcriptformer"]


def test_what_does_not_fit_the_array_is_refused(project: Project, tmp_path: Path) -> None:
    array, cells = array_and_cells(project)
    with pytest.raises(UserError, match=r"compute_precision is 'fp16', and that of .* is 'fp32'"):
        embed(cells, project.checkpoint, like=array, precision="fp16")
    with pytest.raises(UserError, match=r"gene_order is 'vocabulary', and that of .* is 'census'"):
        embed(cells, project.checkpoint, like=array, gene_order="vocabulary")
    known = cells.var["gene_ids"].tolist()
    build_checkpoint(tmp_path / "other", {"x": known}, ["10x 3' v3"], embed_dim=16, seq_len=63, block_len=64, seed=1)
    with pytest.raises(UserError, match=r"was made with the checkpoint .*Give the array's own checkpoint"):
        embed(cells, tmp_path / "other", like=array)
    project.census.rename(tmp_path / "moved")
    with pytest.raises(UserError, match="there is no Census at"):
        embed(cells, project.checkpoint, like=array)
