"""Runs upstream's own inference on a few cells, in float32, in a separate process and environment.

Comparing its values with ours belongs in `check_upstream` and `canary`.
"""

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
from census_tf_dagster.io.files import temporary_folder
from census_tf_dagster.pipeline.context import EmbeddingContext

Embeddings = npt.NDArray[np.float32]

RUN = """
import os, threading
# If the kernel does not end this command with its parent, this thread does.
threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
import torch
from transcriptformer.cli import main
# Importing upstream allows TF32, which is less precise than float32.
torch.set_float32_matmul_precision("highest")
main()
"""
"""Python code that runs upstream's command line. Upstream reacts to SIGTERM only after minutes."""


NAME = "transcriptformer"
VERSION = f"from importlib.metadata import version; print('{NAME}', version('{NAME}'))"
CHECK_SECONDS = 60.0
"""How long upstream may take to report its version. Python starts within a second, but a cold file system is slower."""


EXPECTED = (
    f"expected upstream's `{NAME}` command, in the `bin` folder of an environment where it is installed: pass the path "
    "of that command."
)


def run_upstream() -> str:
    """Return Python code that runs upstream's command as a child process that ends with this process."""
    return f"{inspect.getsource(end_with_parent)}\nend_with_parent({os.getpid()})\n{RUN}"


def find_upstream() -> Path | None:
    """Return upstream's ``transcriptformer`` command, beside this Python or else on the PATH; None if there is none."""
    beside = str(Path(sys.executable).parent)
    found = shutil.which(NAME, path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    return Path(found) if found else None


def require_upstream(command: Path, seconds: float = CHECK_SECONDS) -> None:
    """Check, within seconds, that a program is upstream's command.

    Parameters
    ----------
    command
        Path of upstream's ``transcriptformer``.
    seconds
        How long it may take to report its version.

    Raises
    ------
    UserError
        When it is something else.
    """
    if not command.is_file():
        raise UserError(f"{command}: there is no such file; {EXPECTED}")
    line = [str(_python(command)), "-c", VERSION]
    try:
        done = subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds)  # noqa: S603
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"{command}: the Python beside it did not report within {seconds:.0f} s which version of "
            f"{NAME} it has; {EXPECTED}"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(f"{command}: no Python beside it can be run ({error}); {EXPECTED}") from error
    if done.returncode or not done.stdout.startswith(f"{NAME} ") or command.name != NAME:
        said = (done.stdout if not done.returncode else done.stderr).strip().rpartition("\n")[2][:200]
        raise UserError(f"{command} is another program (the Python beside it says {said!r}); {EXPECTED}")


def _python(command: Path) -> Path:
    return command.resolve().with_name("python")


@contextmanager
def upstream_running(
    context: EmbeddingContext, cells: Cells, command: Path, batch_size: int | None = None
) -> Iterator[Callable[[float], Embeddings]]:
    """Let upstream embed cells on the set's device while the caller does something else.

    Upstream's process ends with the context.

    Parameters
    ----------
    context
        The opened set and release.
    cells
        Cells that `read_cells` returned.
    command
        Upstream's ``transcriptformer``; the Python beside it runs.
    batch_size
        Upstream's batch size; None: its default.

    Yields
    ------
    Callable
        Waits up to the given number of seconds; returns float32 ``(n, embed_dim)`` in the order of `cells`. It raises
        `UserError` if upstream cannot run, has failed or takes longer.

    Raises
    ------
    UserError
        When `command` is another program, or upstream cannot compute this set.
    """
    require_upstream(command)
    if len(context.checkpoint.pretrained) > 1:
        raise UserError(
            f"this set has {len(context.checkpoint.pretrained)} pretrained embedding files; upstream's command takes "
            "at most one, so this set cannot be compared with it."
        )
    genes = list(context.gene_ids)
    counts = scipy.sparse.csr_matrix(
        (cells.values, cells.columns, cells.indptr), shape=(len(cells.joinids), len(genes))
    )
    obs = pd.DataFrame({context.checkpoint.aux_column: list(cells.assays)}, index=cells.joinids.astype(str))
    var = pd.DataFrame({"ensembl_id": genes}, index=genes)
    adata = anndata.AnnData(X=counts, obs=obs, var=var)
    if list(known := context.known_genes) != [gene for gene in genes if context.checkpoint.knows(gene)]:
        # Upstream uses the order of `var`, so `var` gets the order of the set. Other genes make no token.
        column_of = {gene: column for column, gene in reversed(list(enumerate(genes)))}
        adata = adata[:, [column_of[gene] for gene in known]].copy()
    # Upstream writes a folder of logs into its working directory.
    with temporary_folder() as place, tempfile.TemporaryFile() as said:
        folder = Path(place)
        adata.write_h5ad(folder / "cells.h5ad")
        line = [str(_python(command)), "-c", run_upstream(), *_arguments(context, folder, batch_size)]
        try:
            process = subprocess.Popen(line, cwd=folder, stdin=subprocess.PIPE, stdout=said, stderr=said)  # noqa: S603
        except OSError as error:
            raise UserError(f"upstream's {command} cannot be run ({error}); {EXPECTED}") from error

        def answer(seconds: float) -> Embeddings:
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired as error:
                raise UserError(
                    f"upstream's {command} took more than {duration(seconds)} for {len(cells.joinids)} cells and was "
                    "ended; expected it to finish in that time: give it fewer cells, or a faster machine."
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


def _arguments(context: EmbeddingContext, folder: Path, batch_size: int | None) -> list[str]:
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
