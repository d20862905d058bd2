"""Measure the error of each compute precision, and of upstream's default, against upstream in float32.

    python -m benchmarks.inference.precision [--quick] [--json] [--upstream COMMAND] [--device cuda]

The weights are random, in tf_exemplar's shape on a GPU, an eighth as wide on a CPU. Upstream's default is fp16 autocast
(``16-mixed``). The relative RMS is the RMS of the difference over the RMS of the reference. The centred cosine is each
cell's after subtracting the mean of all cells (mean and smallest), because cells share a large mean. All this is before
storage rounding.
"""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import Shape, Upstream, arguments_parser, errors, sample, table, upstream_python
from benchmarks.inference.engine import load_engine

PRECISIONS = ("fp32", "fp16", "bf16")


def measure(
    shape: Shape, median: int, arguments: Any, upstream_path: Path, threads: int
) -> dict[str, dict[str, float]]:
    """Embed the same cells in every way."""
    cells = sample(arguments.cells, shape.vocabulary, median)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        shape.build(folder / "checkpoint")
        cells.adata.write_h5ad(folder / "cells.h5ad")
        request: dict[str, Any] = {"checkpoint": str(folder / "checkpoint"), "cells": str(folder / "cells.h5ad")}
        request |= {"save": str(folder / "upstream.npy"), "device": arguments.device, "batch_size": 4}
        upstream = Upstream(upstream_path, threads)
        try:
            upstream.ask("embed", **request, precision="32", exact=True)
            reference = np.load(request["save"])
            upstream.ask("embed", **request, precision="32", autocast=True)
            found = {"upstream, fp16 autocast (its default)": errors(np.load(request["save"]), reference)}
        finally:
            upstream.close()
        for precision in PRECISIONS:
            tokenizer, engine = load_engine(folder / "checkpoint", shape.genes(), precision, arguments.device)
            found[f"ours, {precision}"] = errors(engine.embed(tokenizer(cells.cells)), reference)
    return found


def main() -> None:
    """Measure two length mixes, print a table."""
    parser = arguments_parser(__doc__, quick="4 cells, on a CPU 2 of 12 layers")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cells", type=int, help="default 64 on a GPU, else 8; 4 if --quick")
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    arguments.cells = arguments.cells or (4 if arguments.quick else 64 if on_gpu else 8)
    upstream_path = upstream_python(arguments.upstream)
    if upstream_path is None:
        raise SystemExit("errors are against upstream: it is needed")
    shape = Shape("exemplar", 1 if on_gpu else 8, layers=2 if arguments.quick and not on_gpu else 12)
    threads = len(os.sched_getaffinity(0))
    print(
        f"{arguments.cells} cells, width {shape.width}, {shape.layers} layers, random weights, {arguments.device}, "
        f"torch {torch.__version__}"
    )
    answers = {median: measure(shape, median, arguments, upstream_path, threads) for median in (90, 1800)}
    rows = [
        [f"median {median:,}: {way}", f"{e['relative_rms']:.1e}", f"{e['cosine']:.6f}", f"{e['least_cosine']:.6f}"]
        for median, ways in answers.items()
        for way, e in ways.items()
    ]
    table(["", "relative RMS", "centred cosine", "smallest"], rows)
    if arguments.json:
        ways = answers[1800]
        ours, reference = (ways[way]["relative_rms"] for way in ("ours, fp16", "upstream, fp16 autocast (its default)"))
        answer = {"ours": ours, "reference": reference, "ratio": ours / reference, "unit": "relative RMS"}
        print(json.dumps({**answer, "ways": answers}))


if __name__ == "__main__":
    main()
