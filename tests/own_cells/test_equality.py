"""Own cells get the values of upstream's own command, in whatever form they come."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import scipy.sparse
import tiledbsoma.io

from census_tf_dagster import embed
from census_tf_dagster.demo.checkpoint import build_checkpoint
from tests.support.own_files import ASSAYS, GENES, checkpoint, some_cells
from tests.support.project import BOUND, UpstreamCommand, relative_errors

__all__ = ["checkpoint"]

pytestmark = [pytest.mark.takes(120), pytest.mark.filterwarnings("ignore::UserWarning")]

Form = Callable[[anndata.AnnData, Path], Any]


def written(folder: Path, adata: anndata.AnnData, **options: Any) -> Path:
    adata.write_h5ad(folder / "form.h5ad", **options)
    return folder / "form.h5ad"


def with_values(kind: type) -> Form:
    def form(adata: anndata.AnnData, folder: Path) -> Path:
        adata.X = adata.X.astype(kind)
        return written(folder, adata)

    return form


def column_wise(adata: anndata.AnnData, folder: Path) -> Path:
    adata.X = scipy.sparse.csc_matrix(adata.X)
    return written(folder, adata)


def dense(adata: anndata.AnnData, folder: Path) -> Path:
    adata.X = adata.X.toarray()
    return written(folder, adata, compression="lzf")


def zarr_store(adata: anndata.AnnData, folder: Path) -> Path:
    adata.write_zarr(folder / "form.zarr")
    return folder / "form.zarr"


def experiment(adata: anndata.AnnData, folder: Path) -> str:
    tiledbsoma.io.from_anndata(str(folder / "form"), adata, measurement_name="RNA", X_layer_name="raw")
    return str(folder / "form")


def backed(adata: anndata.AnnData, folder: Path) -> anndata.AnnData:
    return anndata.read_h5ad(written(folder, adata), backed="r")


def view_of_a_file(adata: anndata.AnnData, folder: Path) -> anndata.AnnData:
    doubled = anndata.concat([adata, adata], merge="same", index_unique="-")
    return anndata.read_h5ad(written(folder, doubled), backed="r")[: adata.n_obs]


def view(adata: anndata.AnnData, folder: Path) -> anndata.AnnData:
    return anndata.concat([adata, adata], merge="same", index_unique="-")[adata.n_obs :]


def layer(adata: anndata.AnnData, folder: Path) -> anndata.AnnData:
    """Its X is found to be no counts, so it has to be named."""
    adata.layers["counts"] = adata.X
    adata.X = adata.X.log1p()
    return adata


def split_values(adata: anndata.AnnData, folder: Path) -> anndata.AnnData:
    """A matrix may hold a value twice; it stands for the sum."""
    parts = scipy.sparse.csr_matrix(adata.X)
    adata.X = scipy.sparse.csr_matrix(
        (np.repeat(parts.data / 2, 2), np.repeat(parts.indices, 2), parts.indptr * 2), parts.shape
    )
    return adata


FORMS: dict[str, Form] = {
    "int64": with_values(np.int64),
    "float64": with_values(np.float64),
    "uint16": with_values(np.uint16),
    "half precision": lambda adata, _: anndata.AnnData(adata.X.toarray().astype(np.float16), adata.obs, adata.var),
    "other bytes": lambda adata, _: anndata.AnnData(adata.X.toarray().astype(">i4"), adata.obs, adata.var),
    "csc": column_wise,
    "dense, lzf": dense,
    "gzip": lambda adata, folder: written(folder, adata, compression="gzip"),
    "zarr": zarr_store,
    "SOMA experiment": experiment,
    "backed": backed,
    "view of a file": view_of_a_file,
    "view": view,
    "layer": layer,
    "only a layer": lambda adata, _: anndata.AnnData(obs=adata.obs, var=adata.var, layers={"counts": adata.X}),
    "values in two parts": split_values,
}


@pytest.mark.upstream
def test_odd_cells_and_every_form(checkpoint: Path, upstream_command: UpstreamCommand, tmp_path: Path) -> None:
    """Cells without counts, with fractions, with too many genes, with an unknown assay: as upstream, in every form."""
    cells = some_cells()
    # Fractions as a method that removes ambient RNA leaves them.
    changed = cells.X.toarray()
    changed[10:13] *= 0.75
    changed[20:22] = 0
    fractions = cells.copy()
    fractions.X = scipy.sparse.csr_matrix(changed)
    fractions.write_h5ad(tmp_path / "cells.h5ad")
    reference = upstream_command.embed_file(checkpoint, tmp_path / "cells.h5ad")
    with pytest.warns(UserWarning, match="3 of 60 cells have counts that are not whole numbers"):
        assert relative_errors(embed(tmp_path / "cells.h5ad", checkpoint), reference).max() <= BOUND
    whole = np.setdiff1d(np.arange(60), [*range(10, 13), *range(20, 22)])
    for name, form in FORMS.items():
        folder = tmp_path / name
        folder.mkdir()
        given = form(cells.copy(), folder)
        found = embed(given, checkpoint, layer="counts" if name == "layer" else None)
        assert relative_errors(found[whole], reference[whole]).max() <= BOUND, name


@pytest.mark.upstream
def test_raw_and_genes_that_occur_twice(checkpoint: Path, upstream_command: UpstreamCommand, tmp_path: Path) -> None:
    cells = some_cells(20)
    cells.raw = cells.copy()
    cells = cells[:, :40].copy()
    cells.write_h5ad(tmp_path / "raw.h5ad")
    reference = upstream_command.embed_file(checkpoint, tmp_path / "raw.h5ad")
    assert relative_errors(embed(tmp_path / "raw.h5ad", checkpoint), reference).max() <= BOUND
    assert relative_errors(embed(cells, checkpoint), reference).max() <= BOUND

    twice = some_cells(20)
    twice.var["ensembl_id"] = [f"{gene}.{i}" for i, gene in enumerate([*GENES[:60], *GENES[:20]])]
    twice.write_h5ad(tmp_path / "twice.h5ad")
    reference = upstream_command.embed_file(checkpoint, tmp_path / "twice.h5ad", "--remove-duplicate-genes")
    ours = embed(tmp_path / "twice.h5ad", checkpoint, duplicate_genes="first")
    assert relative_errors(ours, reference).max() <= BOUND


def check_real_file(
    real_file: Path, upstream_command: UpstreamCommand, tmp_path: Path, seq_len: int, block_len: int, cells: int
) -> None:
    """Compare the first cells of a file; one gene in ten is outside the vocabulary."""
    adata = anndata.read_h5ad(real_file)[:cells].copy()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    known = [gene for i, gene in enumerate(adata.var["ensembl_id"]) if i % 10]
    assays = sorted(set(map(str, adata.obs["assay"])))
    build_checkpoint(tmp_path / "model", {"species": known}, assays, seq_len=seq_len, block_len=block_len)
    reference = upstream_command.embed_file(tmp_path / "model", tmp_path / "cells.h5ad")
    ours = embed(tmp_path / "cells.h5ad", tmp_path / "model")
    assert len(ours) == adata.n_obs
    assert relative_errors(ours, reference).max() <= BOUND


@pytest.mark.soak
@pytest.mark.upstream
def test_all_cells_at_a_short_window(real_file: Path, upstream_command: UpstreamCommand, tmp_path: Path) -> None:
    check_real_file(real_file, upstream_command, tmp_path, 63, 64, 2000)


@pytest.mark.soak
@pytest.mark.upstream
def test_full_window(real_file: Path, upstream_command: UpstreamCommand, tmp_path: Path) -> None:
    check_real_file(real_file, upstream_command, tmp_path, 2047, 128, 50)


def test_the_assay_can_be_given(checkpoint: Path) -> None:
    cells = some_cells(20)
    cells.obs["assay"] = ASSAYS[0]
    expected = embed(cells, checkpoint)
    cells.obs = cells.obs.rename(columns={"assay": "technology"})
    assert np.array_equal(embed(cells, checkpoint, assay_column="technology"), expected)
    assert np.array_equal(embed(cells, checkpoint, assay=ASSAYS[0]), expected)
    assert not np.array_equal(embed(cells, checkpoint), expected)
