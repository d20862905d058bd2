"""The command for cells that are not in a Census: `embed`."""

import argparse
import json
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING

from census_tf_dagster.cli.parsing import PROGRAM, Commands, add_json, print_progress
from census_tf_dagster.errors import UserError

if TYPE_CHECKING:
    from census_tf_dagster.own_cells.embed import Progress

FORMATS = ("h5ad", "parquet", "npy")
SECONDS_BETWEEN_REPORTS = 10.0


def add_commands(commands: Commands) -> None:
    """Declare the commands of this group."""
    embed = commands.add_parser(
        "embed",
        help="embed the cells of h5ad or zarr files or SOMA experiments",
        description=(
            "Embed cells that are not in a Census: h5ad or zarr files with raw counts, or SOMA experiments, on this "
            "machine or on S3. Files are streamed. A command that was killed goes on where it ended. Cells that cannot "
            "be embedded are NaN."
        ),
        epilog=f"example: {PROGRAM} embed cells.h5ad --checkpoint checkpoints/tf_sapiens",
    )
    embed.add_argument("files", nargs="+", metavar="FILE", help="an h5ad or zarr file, or a SOMA experiment")
    embed.add_argument("--checkpoint", required=True, help="folder or S3 prefix of the checkpoint")
    embed.add_argument(
        "--out",
        type=Path,
        help="the file to write, or a folder for several (default: beside each FILE, named NAME.transcriptformer.h5ad)",
    )
    embed.add_argument("--format", choices=FORMATS, help="format of the output (default: by the suffix of --out; h5ad)")
    embed.add_argument("--layer", help="the matrix with raw counts: X, raw, or a layer (default: raw if it is there)")
    embed.add_argument("--gene-column", help="column of var with Ensembl ids, or `index` (default: found by itself)")
    embed.add_argument(
        "--duplicate-genes",
        choices=("refuse", "first"),
        default="refuse",
        help="refuse genes that occur twice, or use the first column of each (default: refuse)",
    )
    embed.add_argument(
        "--assay-column", help="column of obs with the assay (default: the checkpoint's, if it is there)"
    )
    embed.add_argument("--assay", help="one assay for all cells")
    embed.add_argument(
        "--like", metavar="ARRAY", help="embed as the array of a release at this address, so that both can be compared"
    )
    embed.add_argument(
        "--gene-order",
        choices=("file", "vocabulary"),
        help="order in which the model sees genes: that of var, or that of the checkpoint (default: file)",
    )
    embed.add_argument("--precision", choices=("fp32", "fp16", "bf16"), help="default: fp16 on a GPU, fp32 on a CPU")
    embed.add_argument(
        "--device", choices=("auto", "cuda", "cpu"), default="auto", help="cuda: all GPUs of this machine"
    )
    embed.add_argument("--batch-size", type=int, help="most cells in a row of the model (default: as many as fit)")
    embed.add_argument(
        "--pretrained-embedding",
        dest="pretrained_embeddings",
        action="append",
        default=[],
        metavar="FILE",
        help="gene embeddings for a species outside the checkpoint's vocabulary; may be given several times",
    )
    embed.add_argument("--dry-run", action="store_true", help="check everything and print what would be embedded")
    embed.set_defaults(run=_embed)
    add_json(embed)


def _embed(arguments: argparse.Namespace) -> None:
    from census_tf_dagster.own_cells.embed import Options, embed_file, open_options, open_own_cells
    from census_tf_dagster.own_cells.model import Access

    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise UserError(f"--batch-size is {arguments.batch_size}; expected at least 1.")
    outputs = _outputs(arguments.files, arguments.out, arguments.format)
    options = Options(**{field.name: getattr(arguments, field.name) for field in fields(Options)})
    access = Access.of_environment()
    model = open_options(options, access)
    # Every file is checked before anything is computed.
    said: list[str] = []
    done = []
    for file in arguments.files:
        with open_own_cells(file, options, access, model, whole=False) as own:
            said += own.progress.notes
            print_progress("\n".join([own.progress.about, *own.progress.notes]))
    for file, output in outputs.items():
        if arguments.dry_run:
            print_progress(f"{file} -> {output} ({model.precision} on {model.device}); nothing was computed")
            continue
        progress = embed_file(file, output, options, access, model, _Reporter(file))
        print_progress("\n".join([f"{output}: {progress}", *(note for note in progress.notes if note not in said)]))
        facts = {**asdict(progress), "set_aside": {str(cell): why for cell, why in progress.set_aside.items()}}
        done.append({"file": file, "output": str(output), **facts})
    if arguments.json:
        print(json.dumps({"outputs": done}))


class _Reporter:
    def __init__(self, file: str) -> None:
        self._file = file
        self._said = time.monotonic()

    def __call__(self, progress: "Progress") -> None:
        if time.monotonic() - self._said >= SECONDS_BETWEEN_REPORTS:
            self._said = time.monotonic()
            print_progress(f"{self._file}: {progress}")


def _outputs(files: list[str], out: Path | None, suffix: str | None) -> dict[str, Path]:
    """Return the output of each file.

    Raises
    ------
    UserError
        When two files would have the same output, or the output's place is not clear.
    """
    is_file = out is not None and out.suffix.removeprefix(".") in FORMATS and not out.is_dir()
    if out is not None and is_file:
        if len(files) > 1:
            raise UserError(f"--out {out} is one file, and {len(files)} files are given; expected a folder.")
        if suffix not in (None, out.suffix.removeprefix(".")):
            raise UserError(f"--out {out} does not end in --format {suffix}; leave one of them out.")
        return {files[0]: out}
    if len(set(files)) < len(files):
        raise UserError("a file is given twice; expected each once.")
    found: dict[str, Path] = {}
    for file in files:
        name = file.rstrip("/").rpartition("/")[2]
        for end in (".h5ad", ".zarr"):
            name = name.removesuffix(end)
        if out is None and "://" in file:
            raise UserError(f"{file} is not on this machine, so its output needs a place; expected --out.")
        place = out if out is not None else Path(file).parent
        output = place / f"{name}.transcriptformer.{suffix or 'h5ad'}"
        if output in found.values():
            raise UserError(f"two files would be written to {output}; give another --out for one of them.")
        found[file] = output
    return found
