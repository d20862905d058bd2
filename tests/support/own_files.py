"""Cells that are not in a Census, in the files that people have, and a checkpoint that knows most of their genes."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from census_tf_dagster.demo.checkpoint import build_checkpoint

GENES = [f"ENSG{i:011d}" for i in range(80)]
ASSAYS = ["10x 3' v3", "Smart-seq2"]


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint with a window of 63 genes that knows all genes but six, in another order."""
    monkeypatch.setenv("CENSUS_TF_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "checkpoint"
    known = [GENES[i] for i in np.random.default_rng(5).permutation(len(GENES)) if i % 13]
    build_checkpoint(folder, {"homo_sapiens": known}, ASSAYS, embed_dim=16, seq_len=63, block_len=64)
    return folder


def some_cells(n: int = 60, seed: int = 0) -> anndata.AnnData:
    """Return cells with whole counts, some of which have more genes than the window."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(1.5, (n, len(GENES))) * (rng.random((n, len(GENES))) < rng.random((n, 1)))
    counts[:2] = rng.integers(1, 60, (2, len(GENES)))
    # Every cell has a count, so that none is without one by accident.
    counts[:, 1] += 1
    obs = pd.DataFrame({"assay": rng.choice([*ASSAYS, "another assay"], n)}, index=[f"cell-{i}" for i in range(n)])
    var = pd.DataFrame({"ensembl_id": GENES}, index=[f"symbol-{i}" for i in range(len(GENES))])
    return anndata.AnnData(scipy.sparse.csr_matrix(counts.astype(np.float32)), obs, var)
