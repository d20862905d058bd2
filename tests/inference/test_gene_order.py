"""The order of genes in a cell is the release's or, for any release, the checkpoint's."""

from pathlib import Path

import numpy as np
import pytest

from census_tf_dagster.census.cells import Cells
from census_tf_dagster.demo.checkpoint import build_checkpoint
from census_tf_dagster.inference.checkpoint import Checkpoint, read_checkpoint
from census_tf_dagster.inference.tokens import Tokenizer
from tests.support.builders import tiny
from tests.support.project import Project

GENES = [f"ENSG{i:011d}" for i in range(40)]
ASSAYS = ["a", "b"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    known = [*GENES[30:5:-1], "ENSG99999999999"]
    sizes = {"embed_dim": 16, "num_heads": 1, "num_layers": 1, "model_dim": 16, "esm_dim": 16}
    build_checkpoint(tmp_path / "checkpoint", known, ASSAYS, seq_len=15, block_len=16, **sizes)
    return read_checkpoint(tmp_path / "checkpoint")


def cells_over(axis: list[str], counts: list[dict[str, float]]) -> Cells:
    columns = [sorted((axis.index(gene), value) for gene, value in cell.items()) for cell in counts]
    return Cells(
        joinids=np.arange(len(counts)),
        indptr=np.cumsum([0, *map(len, columns)]),
        columns=np.array([column for cell in columns for column, _ in cell], np.int32),
        values=np.array([value for cell in columns for _, value in cell], np.float32),
        assays=tuple(np.resize([*ASSAYS, "else"], len(counts)).tolist()),
    )


@pytest.mark.parametrize("seed", range(4))
def test_vocabulary_order_is_that_of_a_var_in_that_order(checkpoint: Checkpoint, seed: int) -> None:
    """For any order of `var`, tokens by gene equal those of a `var` in the vocabulary's order."""
    rng = np.random.default_rng(seed)
    axis = rng.permutation(GENES).tolist()
    counts = [
        {gene: float(rng.choice([0, 1, 2, 30, 31, 900])) for gene in rng.choice(axis, rng.integers(0, 30), False)}
        for _ in range(50)
    ]
    ours = Tokenizer.build(axis, checkpoint, "vocabulary")
    sorted_axis = [*GENES[30:5:-1], *(gene for gene in GENES if not checkpoint.knows(gene))]
    reference = Tokenizer.build(sorted_axis, checkpoint, "census")
    assert ours.known_genes == reference.known_genes
    assert ours.reorders
    found, expected = ours(cells_over(axis, counts)), reference(cells_over(sorted_axis, counts))
    assert expected.lengths().max() == 16
    for name in ("tokens", "bias", "offsets"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name


def test_a_var_that_has_the_order_already_takes_the_short_way(checkpoint: Checkpoint) -> None:
    assert not Tokenizer.build(GENES[30:5:-1], checkpoint, "vocabulary").reorders
    assert not Tokenizer.build(GENES, checkpoint, "census").reorders


def test_the_order_is_part_of_the_identity(project: Project) -> None:
    tiny(project)
    project.add_set("stable", organism="homo_sapiens", gene_order="vocabulary")
    with project.context("tiny") as first, project.context("stable") as second:
        assert (first.identity.gene_order, second.identity.gene_order) == ("census", "vocabulary")
        assert first.identity.gene_fingerprint != second.identity.gene_fingerprint
