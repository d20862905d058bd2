"""Measure what the order of genes changes: embeddings of real cells in the release's order and in the vocabulary's.

    python -m benchmarks.inference.gene_order [--quick] [--json] FILE.h5ad [FILE.h5ad ...]

The vocabulary lists the file's genes in a seeded random order. The weights are random, of one small model (the softcap
bends its attention scores, as in the demo's model), float32 on the CPU. One run has the window of the published models.
Another has a window of 63 genes, which many of these cells exceed, so that the order also decides which genes the model
sees. For scale, the program also shows the difference between two random orders: this is what happens between two
releases with `gene_order: census`.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import scipy.sparse

from benchmarks.common import arguments_parser, errors, table
from census_tf_dagster.census.cells import Cells
from census_tf_dagster.demo.checkpoint import build_checkpoint
from census_tf_dagster.demo.synthetic import organism_from_h5ad
from census_tf_dagster.inference.checkpoint import read_checkpoint
from census_tf_dagster.inference.checkpoint_cache import prepare
from census_tf_dagster.inference.engine import Engine
from census_tf_dagster.inference.tokens import GeneOrder, Tokenizer

WINDOWS = ((2047, 128), (63, 64))


def compare(path: Path, window: int, block: int, most: int) -> dict[str, float | str]:
    """Embed cells of a file in three orders and compare them with the vocabulary's."""
    organism = organism_from_h5ad(path, "mus_musculus", "Mus musculus")
    counts: scipy.sparse.csr_matrix = organism.counts[:most].sorted_indices()
    genes = organism.genes["feature_id"].tolist()
    assays = organism.cells["assay"].astype(str).tolist()[:most]
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "checkpoint"
        build_checkpoint(folder, rng.permutation(genes).tolist(), sorted(set(assays)), seq_len=window, block_len=block)
        checkpoint = read_checkpoint(folder)
        prepared = prepare(checkpoint, "fp32", Path(place) / "cache")

        def embed(columns: np.ndarray, order: GeneOrder) -> np.ndarray:
            chosen = counts[:, columns].sorted_indices()
            tokenizer = Tokenizer.build([genes[i] for i in columns], checkpoint, order)
            cells = Cells(
                np.arange(len(assays)),
                chosen.indptr.astype(np.int64),
                chosen.indices.astype(np.int32),
                chosen.data.astype(np.float32),
                tuple(assays),
            )
            return Engine.load(prepared, tokenizer.known_genes, device="cpu").embed(tokenizer(cells))

        given, other = np.arange(len(genes)), rng.permutation(len(genes))
        stable = embed(given, "vocabulary")
        census, later = embed(given, "census"), embed(other, "census")
        again = embed(other, "vocabulary")
    expressed = np.diff(counts.indptr)
    first, second = errors(census, stable), errors(later, census)
    return {
        "file": path.name,
        "window": window,
        "cells": len(assays),
        "genes_median": float(np.median(expressed)),
        "exceed": float(np.mean(expressed > window - 1)),
        "census_rms": first["relative_rms"],
        "census_cosine": first["cosine"],
        "census_least_cosine": first["least_cosine"],
        "releases_rms": second["relative_rms"],
        "releases_cosine": second["cosine"],
        "releases_least_cosine": second["least_cosine"],
        "vocabulary_rms": errors(again, stable)["relative_rms"],
    }


def main() -> None:
    """Compare each file at each window, print a table."""
    parser = arguments_parser(__doc__, quick="100 cells of each file")
    parser.add_argument("files", nargs="+", type=Path, help="real cells with raw counts")
    arguments = parser.parse_args()
    most = 100 if arguments.quick else 10_000
    rows = [compare(path, *window, most) for path in arguments.files for window in WINDOWS]
    table(
        [
            "file, window",
            "cells",
            "genes",
            "exceed it",
            "census against vocabulary: rel. RMS",
            "centred cosine (least)",
            "two census orders: rel. RMS",
            "centred cosine (least)",
            "two releases, vocabulary: rel. RMS",
        ],
        [
            [
                f"{row['file']}, {row['window']}",
                f"{row['cells']}",
                f"{row['genes_median']:.0f}",
                f"{row['exceed']:.1%}",
                f"{row['census_rms']:.3f}",
                f"{row['census_cosine']:.3f} ({row['census_least_cosine']:.3f})",
                f"{row['releases_rms']:.3f}",
                f"{row['releases_cosine']:.3f} ({row['releases_least_cosine']:.3f})",
                f"{row['vocabulary_rms']:.1e}",
            ]
            for row in rows
        ],
    )
    if arguments.json:
        last = rows[-1]
        ours, reference = last["vocabulary_rms"], last["releases_rms"]
        print(json.dumps({"ours": ours, "reference": reference, "unit": "relative RMS", "rows": rows}))


if __name__ == "__main__":
    main()
