"""Shared by the benchmark programs: models, cells, upstream as a process, and how to show figures."""

import argparse
import contextlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse

from census_tf_dagster.census.cells import Cells
from census_tf_dagster.demo.checkpoint import build_checkpoint
from census_tf_dagster.demo.synthetic import KNOWN_ASSAYS, synthetic_organism
from census_tf_dagster.identity import Identity

VOCABULARIES = {"sapiens": 23_829, "exemplar": 110_290, "metazoa": 247_388}
UPSTREAM = ".venv-upstream/bin/transcriptformer"


@dataclass(frozen=True)
class Shape:
    """Sizes of one of the three published models, or of a narrower and shallower one.

    The vocabulary shrinks with the width, and the gene-id head's hidden width with the depth too, so that this head
    keeps its proportion to the layers. 16 attention heads and the window of 2,047 stay; attention therefore weighs
    more in a narrow model.
    """

    name: str
    scale: int = 1
    layers: int = 12

    @property
    def width(self) -> int:
        """Of tokens and of the feed-forward part."""
        return 2048 // self.scale

    @property
    def head(self) -> int:
        """Hidden width of the gene-id head."""
        return self.width * self.layers // 12

    @property
    def esm(self) -> int:
        """Width of a protein embedding."""
        return 2560 // self.scale

    @property
    def vocabulary(self) -> int:
        """Genes."""
        return VOCABULARIES[self.name] // self.scale

    def genes(self) -> list[str]:
        """Return the ids of the vocabulary."""
        return gene_ids(self.vocabulary)

    def build(self, folder: Path, genes: Sequence[str] | None = None) -> None:
        """Write a checkpoint of this shape with random weights; `genes`: those of its vocabulary."""
        build_checkpoint(
            folder,
            {"benchmark": genes or self.genes()},
            KNOWN_ASSAYS,
            embed_dim=self.width,
            model_dim=self.width,
            gene_head_dim=self.head,
            esm_dim=self.esm,
            num_heads=16,
            num_layers=self.layers,
        )

    def useful_flops(self, lengths: np.ndarray) -> float:
        """Return what the embeddings of cells of so many tokens cost at least.

        A cell of n tokens: layers x (12 n d^2 + 2 n^2 d). Embedded genes come from a table, nothing is padded, no head
        is computed, and of attention only the causal half.
        """
        n = lengths.astype(np.float64)
        return float(self.layers * (12 * n * self.width**2 + 2 * n**2 * self.width).sum())

    def attention_flops(self, lengths: np.ndarray) -> float:
        """Return the part of `useful_flops` that attention takes."""
        return float(self.layers * 2 * self.width * (lengths.astype(np.float64) ** 2).sum())

    def upstream_flops(self) -> dict[str, float]:
        """Return what upstream computes for every cell, by part; of attention, too, the causal half."""
        d, genes = self.width, 2047
        padded = np.array([genes + 1])
        layers = self.layers * 12.0 * (genes + 1) * d**2
        return {
            "layers": layers,
            "attention": self.useful_flops(padded) - layers,
            # Of the shifted and of the unshifted genes.
            "embedding MLP": 2.0 * genes * 2 * (self.esm * d + d * d),
            "heads": genes * 2.0 * (d * d + d * self.head + self.head * self.vocabulary),
        }


def gene_ids(count: int) -> list[str]:
    """Return so many ids, as `synthetic_organism` numbers them."""
    return [f"ENSG{i:011d}" for i in range(count)]


@dataclass(frozen=True)
class Sample:
    """Synthetic cells in both forms: as this project reads them, and as upstream takes them."""

    cells: Cells
    adata: anndata.AnnData

    def first(self, count: int) -> "Sample":
        """Return so many of them."""
        cells = self.cells
        stop = int(cells.indptr[count])
        return Sample(
            Cells(
                joinids=cells.joinids[:count],
                indptr=cells.indptr[: count + 1],
                columns=cells.columns[:stop],
                values=cells.values[:stop],
                assays=cells.assays[:count],
            ),
            self.adata[:count].copy(),
        )


def sample(cells: int, genes: int, median: int, seed: int = 1) -> Sample:
    """Draw cells whose number of expressed genes is log-normal around a median."""
    drawn = synthetic_organism("homo_sapiens", "Homo sapiens", cells, genes, "ENSG", seed=seed, median_genes=median)
    counts: scipy.sparse.csr_matrix = drawn.counts.sorted_indices()
    assays = drawn.cells["assay"].astype(str).tolist()
    ids = drawn.genes["feature_id"].tolist()
    return Sample(
        Cells(
            joinids=np.arange(cells, dtype=np.int64),
            indptr=counts.indptr.astype(np.int64),
            columns=counts.indices.astype(np.int32),
            values=counts.data.astype(np.float32),
            assays=tuple(assays),
        ),
        anndata.AnnData(
            X=counts,
            obs=pd.DataFrame({"assay": assays}, index=[str(i) for i in range(cells)]),
            var=pd.DataFrame({"ensembl_id": ids}, index=ids),
        ),
    )


class Upstream:
    """Upstream's inference in a process of its own, warm between commands (see `upstream.py`)."""

    def __init__(self, python: Path, threads: int) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        script = Path(__file__).with_name("upstream.py")
        # Upstream writes a folder of logs where it runs.
        self.folder = tempfile.TemporaryDirectory()
        self.process = subprocess.Popen(
            [python, str(script), "serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            cwd=self.folder.name,
            env=thread_environment(threads),
        )
        self.versions = self.ask("hello", threads=threads)

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise RuntimeError(f"upstream failed at {command}:\n{self.errors.read()[-3000:]}")
        return dict(json.loads(line))

    def __enter__(self) -> "Upstream":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the process; it answers SIGTERM only when a computation is over."""
        self.process.kill()
        self.process.wait()
        self.errors.close()
        self.folder.cleanup()


def thread_environment(threads: int) -> dict[str, str]:
    """Return this process's environment, with the libraries' thread pools set."""
    pools = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(pools, str(threads))}


def array_identity(storage_precision: str, features: int) -> Identity:
    """Return the identity of an array with made-up values."""
    return Identity("u", "d", "o", None, 1, "census", "g", "c", "fp16", storage_precision, features)


def arguments_parser(doc: str | None, quick: str) -> argparse.ArgumentParser:
    """Return a parser with the arguments that the programs share."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", action="store_true", help="a JSON object as the last line")
    parser.add_argument("--upstream", default=UPSTREAM, help="upstream's command; its python stands beside it")
    parser.add_argument("--alone", action="store_true", help="measure this project alone")
    return parser


def upstream_python(command: str) -> Path | None:
    """Return the python of upstream's environment; None, and say so, where there is none."""
    python = Path(command).absolute().with_name("python")
    if python.exists():
        return python
    print(f"no upstream at {command} (--upstream): only this project is measured")
    return None


def errors(found: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Compare embeddings, ``(n_cells, features)``: relative RMS, and cosines after the cells' mean was taken away."""
    mean = reference.mean(axis=0)
    a, b = found - mean, reference - mean
    cosine = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    rms = float(np.linalg.norm(found - reference) / np.linalg.norm(reference))
    return {"relative_rms": rms, "cosine": float(cosine.mean()), "least_cosine": float(cosine.min())}


def peak_gib(process: int | str = "self") -> float:
    """Return a process's peak memory; `getrusage` would count its parent's from before the start of the program."""
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return int(kilobytes) / 2**20


def children_peak_gib() -> float:
    """Return the sum of the peaks of the processes that this one has started and that still run."""
    total = 0.0
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            if int(re.findall(r"PPid:\s+(\d+)", (entry / "status").read_text())[0]) == os.getpid():
                total += peak_gib(entry.name)
    return total


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Show the median and, in brackets, minimum and maximum."""
    return f"{np.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def ratios(ours: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Return ours over reference of each round."""
    return [mine / other for mine, other in zip(ours, reference, strict=True)]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print columns, the first to the left, the others to the right."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        cells = [text.rjust(width) for text, width in zip(line, widths, strict=True)]
        print("  ".join([line[0].ljust(widths[0]), *cells[1:]]).rstrip())
