"""Cells that cannot be embedded as they are given get one clear error, before anything is computed."""

import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import numcodecs
import numpy as np
import pytest
import scipy.sparse

from census_tf_dagster import embed
from census_tf_dagster.errors import UserError
from tests.support.own_files import GENES, checkpoint, some_cells

__all__ = ["checkpoint"]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

Change = Callable[[anndata.AnnData], None]


def normalise(adata: anndata.AnnData, total: float = 1e4) -> scipy.sparse.csr_matrix:
    sums = np.asarray(adata.X.sum(axis=1)).ravel()
    return scipy.sparse.csr_matrix(adata.X.multiply(total / sums[:, None]), dtype=np.float32)


def log_normalised(adata: anndata.AnnData) -> None:
    adata.layers["counts"] = adata.X
    adata.X = normalise(adata).log1p()


def log_normalised_alone(adata: anndata.AnnData) -> None:
    adata.X = normalise(adata).log1p()


def log2_normalised(adata: anndata.AnnData) -> None:
    adata.X = normalise(adata, 1e6).log1p() / np.log(2)


def normalised(adata: anndata.AnnData) -> None:
    adata.X = normalise(adata)


def scaled(adata: anndata.AnnData) -> None:
    values = adata.X.toarray()
    adata.X = (values - values.mean(axis=0)) / (values.std(axis=0) + 1)


def symbols(adata: anndata.AnnData) -> None:
    del adata.var["ensembl_id"]


def another_species(adata: anndata.AnnData) -> None:
    adata.var["ensembl_id"] = [gene.replace("ENSG", "ENSMUSG") for gene in GENES]


def twice(adata: anndata.AnnData) -> None:
    adata.var["ensembl_id"] = [*GENES[:70], *GENES[1:11]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (log_normalised, r"X of the AnnData holds log-normalised values \(for example .*Give `layer='counts'`"),
        (log_normalised_alone, "holds log-normalised values.*No other matrix of it has whole numbers"),
        (log2_normalised, "holds log2-normalised values"),
        (normalised, "holds normalised values"),
        (scaled, "holds scaled values"),
        (symbols, "knows none of the 80 genes .*for example 'symbol-0'.*these look like gene symbols"),
        (another_species, r"knows none of the 80 genes .*use a checkpoint that knows these genes"),
        (twice, "10 genes that the checkpoint knows occur more than once .*`duplicate_genes='first'`"),
    ],
)
def test_cells_that_cannot_be_right(checkpoint: Path, change: Change, said: str) -> None:
    cells = some_cells()
    change(cells)
    with pytest.raises(UserError, match=said):
        embed(cells, checkpoint)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"layer": "nothing"}, r"has no matrix 'nothing'; expected one of: X\."),
        ({"gene_column": "id"}, "var of the AnnData has no column 'id'; expected one of: ensembl_id, or `index`"),
        ({"assay_column": "x"}, "obs of the AnnData has no column 'x'; expected one of: assay"),
        ({"assay": "10x 3' v9"}, "does not know the assay .*expected one of: 10x 3' v3, Smart-seq2, unknown"),
        ({"assay": "10x 3' v3", "assay_column": "assay"}, "both given"),
        ({"device": "cuda"}, "this machine has no GPU"),
        ({"device": "gpu"}, "device is 'gpu'; expected auto, cuda or cpu"),
        ({"duplicate_genes": "last"}, "duplicate_genes is 'last'; expected refuse or first"),
        ({"like": "nowhere"}, "is no array of embeddings that this project made"),
        ({"like": "gs://a/b"}, r"like is 'gs://a/b'\. Expected a path, or s3://BUCKET/PREFIX"),
        ({"pretrained_embeddings": ["s3:/a/b"]}, r"pretrained_embeddings is 's3:/a/b'\. Expected a path, or s3://"),
    ],
)
def test_arguments_that_do_not_fit(checkpoint: Path, options: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        embed(some_cells(), checkpoint, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("cells", "said"),
    [
        (
            "https://a.org/cells.h5ad?key=word",
            r"cells is 'https://a\.org/cells\.h5ad\?\*\*\*'\. Expected a path, or s3://",
        ),
        ([some_cells()], r"cells is a list; expected an AnnData, or the path or S3 address of a file"),
        (np.ones((2, 2)), r"cells is a ndarray; expected an AnnData"),
    ],
)
def test_what_is_neither_anndata_nor_a_file(checkpoint: Path, cells: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        embed(cells, checkpoint)
    with pytest.raises(UserError, match=r"write=True needs an AnnData; cells is a (str|list|ndarray)\."):
        embed(cells, checkpoint, write=True)


def test_a_checkpoint_elsewhere(checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"checkpoint is 'https://a\.org/tf_sapiens'\. Expected a path, or s3://"):
        embed(some_cells(), "https://a.org/tf_sapiens")


def test_matrices_without_counts(checkpoint: Path) -> None:
    cells = some_cells()
    cells.layers["nothing"] = scipy.sparse.csr_matrix(cells.shape, dtype=np.float32)
    with pytest.raises(UserError, match=r"no count in the first 60 cells; expected raw counts\. Give `layer='X'`"):
        embed(cells, checkpoint, layer="nothing")
    cells.layers["expressed"] = cells.X.astype(bool)
    with pytest.raises(UserError, match=r"layers\['expressed'\] has values of type bool; expected numbers"):
        embed(cells, checkpoint, layer="expressed")
    with pytest.raises(UserError, match="has no genes"):
        embed(anndata.AnnData(np.ones((3, 0), np.float32)), checkpoint)


def test_an_interrupted_call_leaves_nothing_running(checkpoint: Path) -> None:
    """Nor does it wait for the traceback to go: threads that read a file after it is closed end the process."""
    before = set(threading.enumerate())

    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        embed(some_cells(2000), checkpoint, report=interrupt)
    assert caught.tb is not None
    assert set(threading.enumerate()) == before


def test_files_that_are_something_else(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.h5ad").write_text("no HDF5")
    with pytest.raises(UserError, match=r"text\.h5ad cannot be read as HDF5"):
        embed(tmp_path / "text.h5ad", checkpoint)
    with pytest.raises(UserError, match="cannot be opened as a SOMA experiment"):
        embed(tmp_path, checkpoint)
    with pytest.raises(UserError, match="has no cells"):
        embed(some_cells()[:0].copy(), checkpoint)


@pytest.mark.parametrize("name", ["obs/assay/codes", "var/ensembl_id", "X/indptr", "X/data"])
def test_a_damaged_file_is_named(checkpoint: Path, tmp_path: Path, name: str) -> None:
    """The file can be opened; of the counts, those of late cells are damaged."""
    path = tmp_path / "cells.h5ad"
    some_cells(2000).write_h5ad(path, compression="gzip")
    with h5py.File(path) as opened:
        chunks = opened[name].id
        chunk = chunks.get_chunk_info(chunks.get_num_chunks() - 1)
    with path.open("r+b") as file:
        file.seek(chunk.byte_offset)
        file.write(bytes(chunk.size))
    with pytest.raises(UserError, match=r"cells\.h5ad cannot be read \(.*\); expected .* copy it again"):
        embed(path, checkpoint)


@pytest.mark.parametrize("name", ["obs/assay/codes", "X/data"])
def test_a_damaged_zarr_folder_is_named(checkpoint: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "cells.zarr"
    some_cells().write_zarr(path)
    chunk = path / name / "0"
    chunk.write_bytes(chunk.read_bytes()[:20])
    with pytest.raises(UserError, match=r"cells\.zarr cannot be read \(.*\); expected .* copy it again"):
        embed(path, checkpoint)


def compress(path: Path, number: int, encode: Callable[[bytes], bytes]) -> None:
    """Compress the values of X by an HDF5 filter, without HDF5 having it."""
    with h5py.File(path, "r+") as file:
        values = file["X/data"][:]
        del file["X/data"]
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk(values.shape)
        properties.set_filter(number, h5py.h5z.FLAG_OPTIONAL, ())
        space, kind = h5py.h5s.create_simple(values.shape), h5py.h5t.py_create(values.dtype)
        h5py.h5d.create(file["X"].id, b"data", kind, space, properties).write_direct_chunk((0,), encode(values))


def test_a_compression_that_hdf5_lacks_is_named(checkpoint: Path, tmp_path: Path) -> None:
    some_cells().write_h5ad(tmp_path / "cells.h5ad")
    compress(tmp_path / "cells.h5ad", 500, bytes)
    with pytest.raises(UserError, match=r"cells\.h5ad cannot be read .* `pip install hdf5plugin`"):
        embed(tmp_path / "cells.h5ad", checkpoint)


def test_a_file_compressed_with_zstd(checkpoint: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("hdf5plugin") is None:
        pytest.skip("hdf5plugin is not installed")
    some_cells().write_h5ad(tmp_path / "cells.h5ad")
    expected = embed(tmp_path / "cells.h5ad", checkpoint)
    compress(tmp_path / "cells.h5ad", 32015, numcodecs.Zstd().encode)
    assert np.array_equal(embed(tmp_path / "cells.h5ad", checkpoint), expected)


def test_impossible_counts_are_nan_and_named(checkpoint: Path) -> None:
    cells = some_cells()
    expected = embed(cells, checkpoint, assay="Smart-seq2")
    values = cells.X.toarray()
    values[3, 5], values[7, 5], values[9, 5] = -1, np.inf, np.nan
    cells.X = values
    with pytest.warns(UserWarning, match=r"3 of 60 cells cannot be embedded and are NaN, by position: 3 \(X holds -1"):
        found = embed(cells, checkpoint, assay="Smart-seq2")
    wrong = np.isin(np.arange(60), [3, 7, 9])
    assert np.isnan(found[wrong]).all()
    assert np.abs(found[~wrong] - expected[~wrong]).max() <= 1e-5


def test_an_anndata_gets_what_it_asks_for_and_keeps_its_counts(checkpoint: Path) -> None:
    cells = some_cells()
    order = np.argsort(-cells.X.indices, kind="stable")
    assert len(order)
    before = cells.X.copy()
    found = embed(cells, checkpoint, assay="Smart-seq2", write=True)
    assert np.array_equal(cells.obsm["X_transcriptformer"], found)
    assert found.dtype == np.float32
    assert '"gene_order": "file"' in cells.uns["transcriptformer"]
    assert (before != cells.X).nnz == 0
