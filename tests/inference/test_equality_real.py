"""Real cells, embedded through Dagster's command line, equal upstream's own command."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import scipy.sparse

from census_tf_dagster.demo.census import build_census
from census_tf_dagster.demo.checkpoint import build_checkpoint
from census_tf_dagster.demo.synthetic import organism_from_h5ad
from census_tf_dagster.pipeline.embed_shard import embed_shard
from census_tf_dagster.pipeline.finish_array import finish_array
from census_tf_dagster.pipeline.plan_release import make_plan
from tests.support.project import (
    BOUND,
    RELEASE,
    Project,
    UpstreamCommand,
    as_upstream_input,
    read_array,
    relative_errors,
)

pytestmark = pytest.mark.takes(180)

ORGANISMS = {
    "mouse_merfish_500": ("mus_musculus", "Mus musculus"),
    "human_10x_chr21": ("homo_sapiens", "Homo sapiens"),
}


def check(
    project: Project,
    real_file: Path,
    upstream_command: UpstreamCommand,
    to_the_array: Callable[[Project, str], None],
    *,
    seq_len: int,
    mod: int = 1,
    block_len: int = 128,
    **attributes: Any,
) -> int:
    """Embed a file up to the final array and compare every planned cell; return their number."""
    name, label = ORGANISMS[real_file.stem]
    adata = anndata.read_h5ad(real_file)
    genes = adata.var["ensembl_id"].tolist()
    assays = [str(assay) for assay in adata.obs["assay"]]
    build_census(str(project.census), RELEASE, [organism_from_h5ad(real_file, name, label)])
    # One gene in ten is outside the vocabulary.
    known = [gene for i, gene in enumerate(genes) if i % 10]
    random.Random(0).shuffle(known)
    build_checkpoint(project.checkpoint, {name: known}, sorted(set(assays)), seq_len=seq_len, block_len=block_len)
    project.add_set("real", organism=name, mod=mod, megabatch_size=50, **attributes)
    to_the_array(project, "real")

    chosen = np.arange(0, adata.n_obs, mod)
    stored = read_array(project.array("real"), project.folder)
    assert stored.shape == (adata.n_obs, 64)
    assert np.array_equal(stored.ids, chosen)
    assert stored.stored_values == len(chosen) * 64
    counts = scipy.sparse.csr_matrix(adata.X)[chosen]
    given = as_upstream_input(counts, genes, [assays[i] for i in chosen])
    if attributes.get("gene_order") == "vocabulary":
        given = given[:, known].copy()
    reference = upstream_command.embed(project.checkpoint, given)
    assert relative_errors(stored.values, reference).max() <= BOUND
    return len(chosen)


def by_command(project: Project, name: str) -> None:
    assert project.command("release", "add", RELEASE).returncode == 0
    project.materialize_all(name)


def in_process(project: Project, name: str) -> None:
    with project.context(name) as context:
        make_plan(context)
        for shard in range(context.settings.shards):
            embed_shard(context, shard)
        finish_array(context)


@pytest.mark.upstream
def test_all_cells_at_a_short_window(project: Project, real_file: Path, upstream_command: UpstreamCommand) -> None:
    """Many of these cells express as many genes as a window of 63, or more."""
    assert check(project, real_file, upstream_command, by_command, seq_len=63, block_len=64) in (500, 1107)


@pytest.mark.upstream
def test_vocabulary_order_is_upstreams_on_a_var_in_that_order(
    project: Project, real_file: Path, upstream_command: UpstreamCommand
) -> None:
    """Cells express more genes than a window of 63, so the order also decides which genes the model sees."""
    options = {"seq_len": 63, "block_len": 64, "gene_order": "vocabulary"}
    assert check(project, real_file, upstream_command, in_process, **options) in (500, 1107)


@pytest.mark.upstream
def test_full_window(project: Project, real_file: Path, upstream_command: UpstreamCommand) -> None:
    # Upstream computes the whole window of each cell, so a few cells are enough.
    mod = {"mouse_merfish_500": 84, "human_10x_chr21": 185}[real_file.stem]
    assert check(project, real_file, upstream_command, in_process, seq_len=2047, mod=mod) == 6


@pytest.mark.soak
@pytest.mark.upstream
def test_full_window_on_many_cells(project: Project, real_file: Path, upstream_command: UpstreamCommand) -> None:
    mod = {"mouse_merfish_500": 2, "human_10x_chr21": 5}[real_file.stem]
    assert check(project, real_file, upstream_command, by_command, seq_len=2047, mod=mod) >= 200
