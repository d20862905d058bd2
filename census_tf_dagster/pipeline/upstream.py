"""Upstream's own inference on some cells, in float32, in a process and an environment of its own."""

import inspect
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import anndata
import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse

from census_tf_dagster.census.cells import Cells
from census_tf_dagster.durations import duration
from census_tf_dagster.errors import UserError
from census_tf_dagster.inference.child_processes import end_with_parent
from census_tf_dagster.inference.tokens import genes_in_order
from census_tf_dagster.io.files import temporary_folder
from census_tf_dagster.pipeline.context import ReleaseContext

Embeddings = npt.NDArray[np.float32]

RUN = """
import os, threading
# Where the kernel does not do it, this thread ends the command when its parent has ended.
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
import torch
from transcriptformer.cli import main
# Importing upstream allows TF32, which is no float32.
torch.set_float32_matmul_precision("highest")
main()
"""
"""Upstream's command line; it answers a SIGTERM only after minutes."""


NAME = "transcriptformer"
VERSION = f"from importlib.metadata import version; print('{NAME}', version('{NAME}'))"
CHECK_SECONDS = 60.0
"""Python starts within a second; from a file system that sleeps, within some."""


def run_upstream() -> str:
    """Return Python code that runs upstream's command, as a child of this process that ends with it."""
    return f"{inspect.getsource(end_with_parent)}\nend_with_parent({os.getpid()})\n{RUN}"


def find_upstream() -> Path | None:
    """Return upstream's ``transcriptformer`` command: beside this Python, else on the PATH; None: it is not here."""
    beside = str(Path(sys.executable).parent)
    found = shutil.which(NAME, path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    return Path(found) if found else None


def require_upstream(command: Path, seconds: float = CHECK_SECONDS) -> None:
    """Refuse, within seconds, a program that is not upstream's command.

    Parameters
    ----------
    command
        What should be upstream's ``transcriptformer``.
    seconds
        How long it may take to say its version.

    Raises
    ------
    UserError
        With what it is instead.
    """
    expected = f"expected upstream's `{NAME}` command, in the `bin` folder of an environment where it is installed."
    if not command.is_file():
        raise UserError(f"{command}: there is no such file; {expected}")
    line = [str(_python(command)), "-c", VERSION]
    try:
        done = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"{command}: the Python beside it did not say within {seconds:.0f} s which version of "
            f"{NAME} it has; {expected}"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{command}: no Python beside it can be run ({error}); {expected}") from error
    if done.returncode or not done.stdout.startswith(f"{NAME} ") or command.name != NAME:
        said = (done.stdout if not done.returncode else done.stderr).strip().rpartition("\n")[2][:200]
        raise UserError(f"{command} is another program (the Python beside it says {said!r}); {expected}")


def _python(command: Path) -> Path:
    return command.resolve().with_name("python")


@contextmanager
def upstream_running(
    context: ReleaseContext, cells: Cells, command: Path, batch_size: int | None = None
) -> Iterator[Callable[[float], Embeddings]]:
    """Let upstream embed some cells, on the set's device, while something else is done.

    Parameters
    ----------
    context
        The opened set and release.
    cells
        As read from the Census.
    command
        Upstream's ``transcriptformer``; the Python beside it runs.
    batch_size
        Upstream's; None: its default.

    Yields
    ------
    Callable
        Waits so many seconds at most; returns float32 ``(n, embed_dim)`` in the order of `cells`, or raises
        `UserError` when upstream cannot be run, has failed or takes longer. When the context ends, upstream does.

    Raises
    ------
    UserError
        When `command` is another program, or upstream cannot be run on such a set.
    """
    require_upstream(command)
    if len(context.checkpoint.pretrained) > 1:
        raise UserError("upstream's command takes one pretrained embedding file; this set has more.")
    genes = list(context.genes.ids)
    counts = scipy.sparse.csr_matrix(
        (cells.values, cells.columns, cells.indptr), shape=(len(cells.joinids), len(genes))
    )
    obs = pd.DataFrame({context.checkpoint.aux_column: list(cells.assays)}, index=cells.joinids.astype(str))
    var = pd.DataFrame({"ensembl_id": genes}, index=genes)
    adata = anndata.AnnData(X=counts, obs=obs, var=var)
    if context.settings.gene_order == "vocabulary":
        # Upstream knows no other order than that of `var`.
        adata = adata[:, list(genes_in_order(context.genes.ids, context.checkpoint, "vocabulary"))].copy()
    # It writes a folder of logs where it runs.
    with temporary_folder() as place, tempfile.TemporaryFile() as said:
        folder = Path(place)
        adata.write_h5ad(folder / "cells.h5ad")
        line = [str(_python(command)), "-c", run_upstream(), *_arguments(context, folder, batch_size)]
        try:
            process = subprocess.Popen(line, cwd=folder, stdin=subprocess.PIPE, stdout=said, stderr=said)  # noqa: S603
        except OSError as error:
            raise UserError(f"upstream's {command} cannot be run: {error}") from error

        def answer(seconds: float) -> Embeddings:
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired as error:
                raise UserError(
                    f"upstream's {command} took more than {duration(seconds)} for {len(cells.joinids)} cells, and was "
                    "ended. Give it fewer cells, or a faster machine."
                ) from error
            if code:
                said.seek(0)
                raise UserError(f"upstream's {command} failed:\n{said.read().decode(errors='replace')[-2000:]}")
            return np.asarray(anndata.read_h5ad(folder / "embeddings.h5ad").obsm["embeddings"], np.float32)

        try:
            yield answer
        finally:
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()


def _arguments(context: ReleaseContext, folder: Path, batch_size: int | None) -> list[str]:
    arguments = ["inference", "--checkpoint-path", str(context.checkpoint.folder.absolute())]
    arguments += ["--data-file", str(folder / "cells.h5ad"), "--output-path", str(folder), "--precision", "32"]
    arguments += ["--device", context.settings.device]
    if batch_size is not None:
        arguments += ["--batch-size", str(batch_size)]
    if context.settings.device == "cpu":
        arguments.append("--disable-compile-block-mask")
    for path in context.checkpoint.pretrained:
        arguments += ["--pretrained-embedding", str(path.absolute())]
    return arguments
