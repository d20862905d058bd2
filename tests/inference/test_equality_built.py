"""Artificial cells at every edge of the rules equal upstream's own command, and controls fail."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from torch import Tensor

from census_tf_dagster.census.cells import Cells
from census_tf_dagster.demo.checkpoint import build_checkpoint, build_pretrained_embeddings
from census_tf_dagster.inference import model as model_module
from census_tf_dagster.inference.attention import plain_attention
from census_tf_dagster.inference.checkpoint import Checkpoint, read_checkpoint
from census_tf_dagster.inference.model import Model
from census_tf_dagster.inference.packing import assemble, choose_cells
from census_tf_dagster.inference.tokens import Tokenizer
from tests.support.project import BOUND, DEVICE, UpstreamCommand, as_upstream_input, load_engine, relative_errors

LENGTHS = (0, 1, 2, 127, 128, 2045, 2046, 2047, 2048, 5000)
N_GENES = 5600
GENES = [f"ENSG{i:011d}" for i in range(N_GENES)]
KNOWN = np.arange(N_GENES) % 10 != 3
ASSAYS = ("10x 3' v3", "Smart-seq2")
SHORT = np.flatnonzero(np.array((*LENGTHS, *LENGTHS)) <= 128)
"""The cells that leave most of a window empty."""
LONG = np.array([0, 5, 6, 15, 17])
"""Two rows of 4096 tokens: two full windows, and two cells that are one gene short of it with one that has no gene."""

pytestmark = [pytest.mark.upstream, pytest.mark.takes(150)]


def built_cells(lengths: Sequence[int] = LENGTHS, n_genes: int = N_GENES) -> Cells:
    """Cells with exactly `lengths` known genes expressed, each once per known and once with an unknown assay.

    All have genes outside the vocabulary too, some counts above 30 or between whole numbers, and explicit zeros.
    """
    rng = np.random.default_rng(7)
    rows = []
    known = KNOWN[:n_genes]
    for n in (*lengths, *lengths):
        row = np.zeros(n_genes, np.float32)
        row[rng.choice(np.flatnonzero(known), n, replace=False)] = rng.geometric(0.15, n)
        row[rng.choice(np.flatnonzero(~known), 40, replace=False)] = 5
        rows.append(row)
    counts = scipy.sparse.csr_matrix(np.stack(rows))
    assert counts.data.max() > 30
    assays = [*(ASSAYS[i % 2] for i in range(len(lengths))), *["never seen"] * len(lengths)]
    # These are stored zeros of genes that are not expressed.
    extra = scipy.sparse.random(*counts.shape, density=0.01, format="csr", random_state=3, dtype=np.float32)
    extra.data[:] = 2**-20
    mixed = (counts + extra).tocsr()
    mixed.data = np.floor(mixed.data)
    assert (mixed.data == 0).sum() > 100
    assert np.array_equal(mixed.toarray(), counts.toarray())
    # Every seventh count is not a whole number; some of these are near 0 or above 30.
    mixed.data[::7] = np.where(mixed.data[::7] > 0, mixed.data[::7] - np.float32(0.7), 0)
    mixed.sort_indices()
    return Cells(
        joinids=np.arange(len(assays)),
        indptr=mixed.indptr.astype(np.int64),
        columns=mixed.indices.astype(np.int32),
        values=mixed.data,
        assays=tuple(assays),
    )


def as_matrix(cells: Cells, n_genes: int = N_GENES) -> scipy.sparse.csr_matrix:
    shape = (len(cells.assays), n_genes)
    matrix = scipy.sparse.csr_matrix((cells.values, cells.columns, cells.indptr), shape=shape, copy=True)
    # Upstream must not depend on the order of indices, either.
    for i in range(matrix.shape[0]):
        part = slice(matrix.indptr[i], matrix.indptr[i + 1])
        matrix.indices[part], matrix.data[part] = matrix.indices[part][::-1].copy(), matrix.data[part][::-1].copy()
    matrix.has_sorted_indices = False
    return matrix


def embed(
    checkpoint: Checkpoint,
    cells: Cells,
    gene_ids: list[str] = GENES,
    change: Callable[[Model], Model] = lambda model: model,
    **options: Any,
) -> np.ndarray:
    tokenizer = Tokenizer.build(gene_ids, checkpoint)
    engine = load_engine(checkpoint, tokenizer.known_genes, **options)
    engine.model = change(engine.model)
    return engine.embed(tokenizer(cells))


def embed_packed(checkpoint: Checkpoint, chosen: np.ndarray, row_length: int) -> np.ndarray:
    """Embed some of the cells on the GPU's path, on any device."""
    tokenizer = Tokenizer.build(GENES, checkpoint)
    packed = tokenizer(built_cells())
    model = load_engine(checkpoint, tokenizer.known_genes).model
    ours = np.empty((len(chosen), model.shape.embed_dim), np.float32)
    rows = choose_cells(packed.lengths()[chosen], row_length)
    assert min(map(len, rows)) > 1
    for cells in rows:
        ours[cells] = model.embed(assemble(packed, chosen[cells]), row_length).cpu().numpy()
    return ours


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    known = [gene for gene, is_known in zip(GENES, KNOWN, strict=True) if is_known]
    build_checkpoint(folder, {"a": known[:2000], "b": known[2000:]}, ASSAYS)
    return folder


@pytest.fixture(scope="module")
def reference(checkpoint_folder: Path, upstream_command: UpstreamCommand) -> np.ndarray:
    cells = built_cells()
    return upstream_command.embed(checkpoint_folder, as_upstream_input(as_matrix(cells), GENES, list(cells.assays)))


def test_every_length_and_assay(checkpoint_folder: Path, reference: np.ndarray) -> None:
    ours = embed(read_checkpoint(checkpoint_folder), built_cells())
    assert relative_errors(ours, reference).max() <= BOUND


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_do_not_matter(checkpoint_folder: Path, reference: np.ndarray, batch_size: int) -> None:
    ours = embed(read_checkpoint(checkpoint_folder), built_cells(), batch_size=batch_size)
    assert relative_errors(ours, reference).max() <= BOUND


def test_biases_of_projections(tmp_path: Path, upstream_command: UpstreamCommand) -> None:
    """No published checkpoint has them, but upstream computes with them."""
    genes = GENES[:200]
    build_checkpoint(tmp_path / "c", {"a": genes}, ASSAYS, embed_dim=32, num_heads=2, seq_len=127, block_len=128)
    config, weights = tmp_path / "c" / "config.json", tmp_path / "c" / "model_weights.pt"
    config.write_text(re.sub(r'"(attn_bias|fw_bias)": false', r'"\1": true', config.read_text()))
    state = torch.load(weights, weights_only=True)
    layers = [name for name in state if re.search(r"encoder_layers.*(linears\.\d|linear\d)\.weight$", name)]
    generator = torch.Generator().manual_seed(0)
    for name in layers:
        state[f"{name.removesuffix('weight')}bias"] = torch.randn(len(state[name]), generator=generator) * 0.3
    torch.save(state, weights)
    rng = np.random.default_rng(0)
    counts = scipy.sparse.csr_matrix((rng.geometric(0.3, (6, 200)) * (rng.random((6, 200)) < 0.3)).astype(np.float32))
    cells = Cells(np.arange(6), counts.indptr.astype(np.int64), counts.indices, counts.data, ASSAYS * 3)
    reference = upstream_command.embed(tmp_path / "c", as_upstream_input(counts, genes, list(cells.assays)))
    checkpoint = read_checkpoint(tmp_path / "c")
    assert relative_errors(embed(checkpoint, cells, genes), reference).max() <= BOUND


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_packed_rows(checkpoint_folder: Path, reference: np.ndarray) -> None:
    """On the GPU's path, several cells share a row: short ones with padding, long ones without."""
    checkpoint = read_checkpoint(checkpoint_folder)
    # On a CPU, this path computes every pair of tokens of a row.
    for chosen, row_length in ((SHORT, 1024), (LONG, 4096)):
        assert relative_errors(embed_packed(checkpoint, chosen, row_length), reference[chosen]).max() <= BOUND


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_control_packed_mask_off_fails(
    checkpoint_folder: Path, reference: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = model_module.packed_terms
    monkeypatch.setattr(
        model_module, "packed_terms", lambda bias, offsets, *others: own(bias, offsets[[0, -1]], *others)
    )
    ours = embed_packed(read_checkpoint(checkpoint_folder), SHORT, 1024)
    assert relative_errors(ours, reference[SHORT]).max() > 10 * BOUND


def test_unsorted_genes_of_upstream_are_ours_in_var_order(checkpoint_folder: Path, reference: np.ndarray) -> None:
    """The fixture is sensitive: with genes in another order, values differ."""
    checkpoint = read_checkpoint(checkpoint_folder)
    assert relative_errors(embed(checkpoint, built_cells(), GENES[::-1]), reference).max() > 10 * BOUND


def test_pretrained_embeddings(tmp_path: Path, upstream_command: UpstreamCommand) -> None:
    """The genes of a species outside the vocabulary come from its own embedding file."""
    genes = GENES[:1000]
    # Upstream always computes its count head, which needs a vocabulary at least as large as the file's.
    others = [f"ENSMUSG{i:011d}" for i in range(1000)]
    build_checkpoint(tmp_path / "checkpoint", {"other": others}, ASSAYS, seq_len=127)
    genes_file = tmp_path / "species_gene.h5"
    build_pretrained_embeddings(genes_file, [g for g, known in zip(genes, KNOWN, strict=False) if known], 96, seed=3)
    cells = built_cells((0, 1, 2, 125, 126, 127, 128, 800), len(genes))
    expected = upstream_command.embed(
        tmp_path / "checkpoint", as_upstream_input(as_matrix(cells, len(genes)), genes, list(cells.assays)), genes_file
    )
    ours = embed(read_checkpoint(tmp_path / "checkpoint", [genes_file]), cells, genes)
    assert relative_errors(ours, expected).max() <= BOUND


def shift_counts(cells: Cells) -> Cells:
    return replace(cells, values=np.where(cells.values > 0, cells.values + 1, 0).astype(np.float32))


def swap_assays(cells: Cells) -> Cells:
    return replace(
        cells, assays=tuple(ASSAYS[assay == ASSAYS[0]] if assay in ASSAYS else assay for assay in cells.assays)
    )


@pytest.mark.parametrize("change", [shift_counts, swap_assays])
def test_controls_on_input_fail(
    checkpoint_folder: Path, reference: np.ndarray, change: Callable[[Cells], Cells]
) -> None:
    ours = embed(read_checkpoint(checkpoint_folder), change(built_cells()))
    assert relative_errors(ours, reference).max() > 10 * BOUND


def test_control_softcap_off_fails(checkpoint_folder: Path, reference: np.ndarray) -> None:
    def uncap(model: Model) -> Model:
        return replace(model, shape=replace(model.shape, softcap=0.0))

    ours = embed(read_checkpoint(checkpoint_folder), built_cells(), change=uncap)
    assert relative_errors(ours, reference).max() > 10 * BOUND


def test_control_pooling_by_own_length_fails(checkpoint_folder: Path, reference: np.ndarray) -> None:
    own_length = np.array([min(n, 2046) + 1 for n in (*LENGTHS, *LENGTHS)])
    ours = embed(read_checkpoint(checkpoint_folder), built_cells()) * (2047 / own_length)[:, None]
    errors = relative_errors(ours, reference)
    assert (errors > 10 * BOUND).sum() == (own_length < 2047).sum()


@pytest.mark.skipif(DEVICE != "cpu", reason="the path of the CPU")
def test_control_document_mask_off_fails(
    checkpoint_folder: Path, reference: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unbounded(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, bounds: tuple[int, ...], softcap: float) -> Tensor:
        return plain_attention(q, k, v, bias, (0, bounds[-1]), softcap)

    monkeypatch.setattr(model_module, "plain_attention", unbounded)
    assert relative_errors(embed(read_checkpoint(checkpoint_folder), built_cells()), reference).max() > 10 * BOUND
