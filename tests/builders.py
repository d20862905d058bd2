"""A tiny project with synthetic cells: a Census, a checkpoint and a set, in well under a second."""

from typing import Any

from census_tf_dagster.demo.census import build_census
from census_tf_dagster.demo.checkpoint import build_checkpoint
from census_tf_dagster.demo.synthetic import KNOWN_ASSAYS, synthetic_organism
from tests.support import RELEASE, Project

N_GENES = 120


def tiny(project: Project, *, cells: int = 200, **attributes: Any) -> Project:
    """Add a Census of human cells, a checkpoint with a window of 63 genes, and the set `tiny`."""
    organism = synthetic_organism("homo_sapiens", "Homo sapiens", cells, N_GENES, "ENSG", seed=1, median_genes=40)
    build_census(str(project.census), RELEASE, [organism])
    genes = organism.genes["feature_id"].tolist()
    build_checkpoint(
        project.checkpoint, {"homo_sapiens": genes[6:]}, KNOWN_ASSAYS, embed_dim=16, seq_len=63, block_len=64
    )
    project.add_set("tiny", organism="homo_sapiens", **{"megabatch_size": 16, **attributes})
    return project
