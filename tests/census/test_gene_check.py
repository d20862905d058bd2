"""The check of gene ids passes real gene axes, and refuses permuted axes and those of other species."""

import warnings
from importlib.util import find_spec
from pathlib import Path

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

from census_tf_dagster.census.gene_check import GeneEvidence, housekeeping_genes, look_at_genes, require_organism
from census_tf_dagster.census.release import Genes
from census_tf_dagster.config.thresholds import LEAST_RANK
from census_tf_dagster.demo.census import Organism, build_census
from census_tf_dagster.demo.checkpoint import build_checkpoint
from census_tf_dagster.demo.run import GENES, ORGANISMS
from census_tf_dagster.demo.synthetic import KNOWN_ASSAYS, synthetic_organism
from census_tf_dagster.errors import UserError
from census_tf_dagster.operate.dry_run import describe, dry_run
from census_tf_dagster.pipeline.plan_release import draft_plan, make_plan
from tests.support.builders import fill, tiny
from tests.support.project import RELEASE, REPOSITORY, SHARED_DATA, Project


def expressing(counts: sp.csr_matrix) -> np.ndarray:
    return np.bincount(counts.indices[counts.data > 0], minlength=counts.shape[1])


def evidence(ids: list[str], counts: sp.csr_matrix, organism: str, var: np.ndarray | None = None) -> GeneEvidence:
    """Check all cells, with a `var` that counts them or with another one."""
    whole = expressing(counts)
    return look_at_genes(Genes(tuple(ids), whole if var is None else var, ""), organism, whole, counts.shape[0])


@pytest.mark.parametrize(
    ("name", "organism", "rank"),
    [("human_10x_chr21", "homo_sapiens", 0.96), ("mouse_merfish_500", "mus_musculus", None)],
)
def test_real_axes_have_no_doubts(name: str, organism: str, rank: float | None) -> None:
    path = SHARED_DATA / f"{name}.h5ad"
    if not path.exists():
        pytest.skip(f"needs {path}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata = anndata.read_h5ad(path)
    ids, counts = adata.var["ensembl_id"].astype(str).tolist(), sp.csr_matrix(adata.X)
    require_organism(ids, organism)
    found = evidence(ids, counts, organism)
    assert (found.rank and round(found.rank, 2), found.doubts) == (rank, [])
    # In this table of genes, the rows with their numbers of cells belong to other columns.
    rng = np.random.default_rng(0)
    for _ in range(50):
        order = rng.permutation(len(ids))
        var = expressing(counts)[order]
        (doubt,) = evidence([ids[i] for i in order], counts, organism, var).doubts[-1:]
        assert "the order of `var` does not seem to be that of X" in doubt
    other = "mus_musculus" if organism == "homo_sapiens" else "homo_sapiens"
    with pytest.raises(UserError, match=f"{other} has 0 of .* which belongs to {organism}"):
        require_organism(ids, other)


def test_permuted_ids_of_real_blood_cells_are_doubted() -> None:
    """Read scanpy's 700 cells and 765 genes. The genes vary: the hardest case for the check."""
    found = find_spec("scanpy")
    assert found is not None
    assert found.origin is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata = anndata.read_h5ad(Path(found.origin).parent / "datasets" / "10x_pbmc68k_reduced.h5ad")
    table = REPOSITORY / "census_tf_dagster" / "census" / "housekeeping_genes.tsv"
    id_of = dict(row.split("\t")[:2] for row in table.read_text().splitlines()[1:])
    symbols, counts = adata.raw.var_names.tolist(), sp.csr_matrix(adata.raw.X)
    ids = [id_of.get(symbol, symbol) for symbol in symbols]
    real = evidence(ids, counts, "homo_sapiens")
    assert (real.doubts, real.listed) == ([], 42)
    assert real.rank == pytest.approx(0.80, abs=0.01)
    rng = np.random.default_rng(0)
    ranks = [evidence([ids[i] for i in rng.permutation(len(ids))], counts, "homo_sapiens") for _ in range(200)]
    assert max(one.rank or 0 for one in ranks) < LEAST_RANK - 0.03
    assert all("the gene ids do not seem to belong to these counts" in str(one) for one in ranks)


@pytest.mark.parametrize("name", ORGANISMS)
def test_the_demos_genes_have_no_doubts(name: str) -> None:
    kind = ORGANISMS[name]
    seed = list(ORGANISMS).index(name)
    made = synthetic_organism(name, kind.label, 64, GENES, kind.gene_prefix, seed=seed)
    ids = made.genes["feature_id"].tolist()
    require_organism(ids, name)
    assert evidence(ids, made.counts, name).doubts == []


def name_genes(organism: Organism) -> None:
    """Give the 40 most expressed genes the ids of housekeeping genes."""
    most = np.argsort(-expressing(organism.counts), kind="stable")[:40]
    organism.genes.loc[most, "feature_id"] = sorted(housekeeping_genes("homo_sapiens"))[:40]


def permute_genes(organism: Organism) -> None:
    name_genes(organism)
    ids = organism.genes["feature_id"].to_numpy()
    organism.genes["feature_id"] = np.random.default_rng(0).permutation(ids)


def test_planning_warns_of_a_permuted_axis(project: Project) -> None:
    tiny(project, change=permute_genes)
    with project.context("tiny") as context:
        (warning,) = make_plan(context).warnings
        assert "40 housekeeping genes outrank other expressed genes in" in warning
        assert f"WARNING: {warning}" in describe(dry_run(context, None, recompute=False))


def test_planning_finds_nothing_against_the_right_axis(project: Project) -> None:
    tiny(project, change=name_genes)
    with project.context("tiny") as context:
        summary = draft_plan(context).summary
    assert summary.warnings == ()
    assert "40 housekeeping genes outrank other expressed genes in" in summary.gene_check


def test_planning_refuses_another_species_axis_that_the_checkpoint_knows(project: Project) -> None:
    made = synthetic_organism("mus_musculus", "Mus musculus", 60, 120, "ENSG", seed=1, median_genes=40)
    build_census(str(project.census), RELEASE, [made])
    build_checkpoint(
        project.checkpoint, made.genes["feature_id"].tolist(), KNOWN_ASSAYS, embed_dim=16, seq_len=63, block_len=64
    )
    project.add_set("mouse", organism="mus_musculus")
    with (
        project.context("mouse") as context,
        pytest.raises(UserError, match=r"mus_musculus has 0 of 120 gene ids with the prefix ENSMUSG; 120 have 'ENSG'"),
    ):
        make_plan(context)
    assert not (project.folder / "store").exists()


@pytest.mark.parametrize("change", [name_genes, permute_genes])
def test_an_array_over_a_permuted_axis_fails_its_check(project: Project, change: object) -> None:
    from census_tf_dagster.pipeline.assess_quality import assess
    from census_tf_dagster.pipeline.finish_array import finish_array

    tiny(project, change=change)
    with project.context("tiny") as context:
        fill(context)
        finish_array(context)
        verdict = assess(context).verdicts["gene_ids_fit_counts"]
    assert verdict.passed == (change is name_genes)
    assert not verdict.grave
    assert verdict.figures["housekeeping_genes"] == 40
