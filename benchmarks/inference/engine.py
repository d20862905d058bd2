"""Measure compute alone: this project's engine against upstream's `run_inference`, on the same cells and checkpoint.

    python -m benchmarks.inference.engine [--quick] [--json] [--upstream COMMAND] [--device cuda]

The weights are random, in the shapes of the three models on a GPU, an eighth as wide on a CPU. There are three mixes of
cell lengths. Ours and upstream take turns. Cells are tokenized beforehand. Upstream's seconds are those of its
`predict_step` on its own batches (with its padding and its heads). Both are warm and have the same number of threads.
On a CPU upstream's attention is not compiled: it computes every score, masked or not, in many passes over memory. So
the program shows the share of attention in the seconds, beside the ratio that FLOPs predict (which counts half of
attention on both sides).

Useful FLOPs of a cell of n tokens are layers x (12 n d^2 + 2 n^2 d): the embedding alone, no padding, half of
attention. They are given as a share of the device's rate at large matrix products, which is measured in the same run
and the same precision. On a GPU, float32 and the errors against it are measured on the first 96 cells only, because
float32 uses no tensor cores. Errors are against upstream in full float32: the RMS of the difference over the RMS of the
reference, and the cosine of each cell after subtracting the mean of all cells (the smallest).

Figures are printed as they are measured, so a run that is cut short is not lost. `--profile` shows where one more run
of ours spends the device's time.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import (
    VOCABULARIES,
    Sample,
    Shape,
    Upstream,
    arguments_parser,
    errors,
    ratios,
    sample,
    spread,
    table,
    upstream_python,
)
from benchmarks.inference.kernel_profile import show_profile
from benchmarks.upstream import matmul_rate
from census_tf_dagster.inference.checkpoint import read_checkpoint
from census_tf_dagster.inference.checkpoint_cache import prepare
from census_tf_dagster.inference.engine import Engine
from census_tf_dagster.inference.prepared_checkpoint import DTYPES
from census_tf_dagster.inference.tokens import Tokenizer

MEDIANS = (90, 1800, 3500)
FLOAT32_CELLS = 96
"""At most, on a GPU."""
SHORT, MORE = 500, 10
"""Below this median our engine alone gets so many times the cells on a GPU, which else is done too soon to measure."""


def load_engine(checkpoint: Path, genes: list[str], precision: str, device: str) -> tuple[Tokenizer, Engine]:
    """Load this project's engine."""
    opened = read_checkpoint(checkpoint)
    tokenizer = Tokenizer.build(genes, opened)
    prepared = prepare(opened, precision, checkpoint.with_name("cache"))
    return tokenizer, Engine.load(prepared, tokenizer.known_genes, device)


def gpu_bytes(device: str) -> int:
    """Return what is allocated on the GPU now."""
    return torch.cuda.memory_allocated() if device == "cuda" else 0


@dataclass
class Way:
    """One way to embed, and what its rounds gave."""

    name: str
    precision: str
    run: Callable[[], dict[str, float]]
    """Embeds all cells; returns seconds of `compute` (and of `attention` in it, where that is known), and `gpu_gib`."""
    embeddings: Callable[[], np.ndarray]
    lengths: np.ndarray
    """Tokens of each cell."""
    fill: float
    rounds: list[dict[str, float]] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """Return the compute seconds of each round."""
        return [one["compute"] for one in self.rounds]

    @property
    def rates(self) -> list[float]:
        """Return the cells per second of each round."""
        return [len(self.lengths) / seconds for seconds in self.seconds]


def upstream_batch(shape: Shape, arguments: Any) -> int:
    """Return the batch size for upstream: 48 on a GPU, as the reference workflow's, where that fits beside us."""
    if arguments.batch_size:
        return int(arguments.batch_size)
    if arguments.device == "cpu":
        return min(4, int(arguments.cells))
    logits = 2 * 2047 * shape.vocabulary
    return min(48, torch.cuda.get_device_properties(0).total_memory // 4 // logits)


def our_way(checkpoint: Path, genes: list[str], cells: Sample, precision: str, device: str) -> Way:
    """Load and warm our engine."""
    before = gpu_bytes(device)
    tokenizer, engine = load_engine(checkpoint, genes, precision, device)
    weights = gpu_bytes(device) - before
    packed = tokenizer(cells.cells)
    last: list[np.ndarray] = []

    def run() -> dict[str, float]:
        others = gpu_bytes(device) - weights
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.monotonic()
        last[:] = [engine.embed(packed)]
        seconds = time.monotonic() - started
        peak = torch.cuda.max_memory_allocated() - others if device == "cuda" else 0
        return {"compute": seconds, "gpu_gib": peak / 2**30}

    run()
    fill = engine.counters.tokens / engine.counters.row_tokens
    return Way(f"ours, {precision}", precision, run, lambda: last[0], packed.lengths(), fill)


def upstream_way(
    upstream: Upstream, request: dict[str, Any], cells: Sample, lengths: np.ndarray, *, exact: bool = False
) -> Way:
    """Make upstream a way of the same kind, and its file of cells; `exact`: the reference, full float32."""
    cells.adata.write_h5ad(request["cells"])
    precision = "32" if exact or request["device"] == "cpu" else "16-mixed"

    def run() -> dict[str, float]:
        return upstream.ask("embed", **request, precision=precision, exact=exact)

    # The last batch is filled up with empty cells.
    computed = -(-len(lengths) // request["batch_size"]) * request["batch_size"] * 2048
    way = "fp32" if precision == "32" else "fp16"
    fill = int(lengths.sum()) / computed
    return Way(f"upstream, {precision}", way, run, lambda: np.load(request["save"]), lengths, fill)


def measure(
    shape: Shape, folder: Path, median: int, upstream: Upstream | None, arguments: Any
) -> tuple[list[list[str]], dict[str, Any]]:
    """Measure one length mix; return table rows and all figures."""
    device, count = arguments.device, arguments.cells
    if device == "cuda" and median < SHORT and not upstream:
        count *= MORE
    cells = sample(count, shape.vocabulary, median)
    few = cells.first(min(count, FLOAT32_CELLS)) if device == "cuda" else cells
    ways = []
    for precision in arguments.precisions:
        begun = time.monotonic()
        ways.append(
            our_way(folder / "checkpoint", shape.genes(), few if precision == "fp32" else cells, precision, device)
        )
        print(f"  {ways[-1].name}: warm after {time.monotonic() - begun:.1f} s")
    full: Way | None = None
    if upstream:
        request: dict[str, Any] = {"checkpoint": str(folder / "checkpoint"), "cells": str(folder / "cells.h5ad")}
        request |= {
            "save": str(folder / "upstream.npy"),
            "device": device,
            "batch_size": upstream_batch(shape, arguments),
        }
        ways.append(upstream_way(upstream, request, cells, ways[0].lengths))
        if device == "cuda":
            begun = time.monotonic()
            ways[-1].run()
            print(f"  {ways[-1].name}: warm after {time.monotonic() - begun:.1f} s")
    for _ in range(arguments.rounds):
        for way in ways:
            way.rounds.append(way.run())
            print(f"  {way.name}: {way.rates[-1]:,.2f} cells/s")
    if upstream:
        full = ways[-1]
        if device == "cuda":
            # A small batch: upstream's logits in float32 are 0.9 GB a cell, of tf_metazoa 2 GB.
            request |= {"batch_size": 8, "save": str(folder / "exact.npy")}
            full = upstream_way(upstream, request, few, ways[0].lengths[:FLOAT32_CELLS], exact=True)
            full.run()
    reference = full.embeddings() if full else None
    rows, figures = [], {}
    for way in ways:
        flops = shape.useful_flops(way.lengths) / float(np.median(way.seconds))
        share = flops / matmul_rate(device, way.precision)
        gpu_gib = max(one["gpu_gib"] for one in way.rounds)
        known = None if reference is None else errors(way.embeddings()[: len(reference)], reference)
        shown = ["", ""] if known is None else [f"{known['relative_rms']:.1e}", f"{known['least_cosine']:.6f}"]
        rows.append(
            [
                f"{shape.name}, median {median:,}: {way.name}",
                spread(way.rates, 2 if device == "cpu" else 1),
                f"{way.lengths.sum() / np.median(way.seconds):,.0f}",
                f"{way.fill:.2f}",
                f"{flops / 1e12:,.3f}",
                f"{share:.2f}",
                f"{gpu_gib:.1f}",
                *(shown if known is None or known["relative_rms"] > 0 else ["reference", ""]),
            ]
        )
        figures[way.name] = {"cells_per_second": way.rates, "useful_flops_per_second": flops, "matmul_share": share}
        figures[way.name] |= {"fill": way.fill, "gpu_gib": gpu_gib, "error": known, "rounds": way.rounds}
    lengths = ways[0].lengths
    if arguments.profile:
        figures["profile"] = show_profile(ways[0].run, device, shape.attention_flops(lengths))
    predicted = sum(shape.upstream_flops().values()) * count / shape.useful_flops(lengths)
    answer = {"model": shape.name, "median": median, "tokens": int(lengths.sum()), "ways": figures}
    answer |= {"ours": float(np.median(ways[0].rates)), "predicted_ratio": predicted}
    if upstream:
        ratio = ratios(ways[-1].seconds, ways[0].seconds)
        rows.append([f"  ratio; by FLOPs {predicted:.1f}", spread(ratio), *[""] * 7])
        if device == "cpu":
            parts = [one["attention"] / one["compute"] for one in ways[-1].rounds]
            rows.append(["  attention's share of upstream's seconds", spread(parts, 2), *[""] * 7])
        answer |= {"reference": float(np.median(ways[-1].rates))}
        answer |= {"ratio": float(np.median(ratio)), "ratios": ratio}
    return rows, answer


def main() -> None:
    """Build each model, measure each mix in turn, print a table."""
    parser = arguments_parser(__doc__, quick="exemplar alone, one round; on a CPU 3 cells and 2 of 12 layers")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="+", choices=list(VOCABULARIES), help="default: all three")
    parser.add_argument("--medians", nargs="+", type=int, default=MEDIANS, help="expressed genes of a cell")
    parser.add_argument("--scale", type=int, help="the models' width is divided by this; default 1 on a GPU, else 8")
    parser.add_argument("--cells", type=int, help="in a round; default 480 on a GPU, else 4")
    parser.add_argument("--rounds", type=int, help="default 3, or 1 if --quick")
    parser.add_argument(
        "--precisions", nargs="+", choices=list(DTYPES), help="of ours; default all on a GPU, else fp32"
    )
    parser.add_argument(
        "--profile", action="store_true", help="show which kernels take the time of the first precision"
    )
    parser.add_argument("--batch-size", type=int, help="upstream's; default 48 on a GPU if it fits, else 4")
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    arguments.scale = arguments.scale or (1 if on_gpu else 8)
    small = arguments.quick and not on_gpu
    arguments.cells = arguments.cells or (480 if on_gpu else 3 if small else 4)
    arguments.rounds = arguments.rounds or (1 if arguments.quick else 3)
    arguments.precisions = arguments.precisions or (["fp16", "bf16", "fp32"] if on_gpu else ["fp32"])
    models = arguments.models or (["exemplar"] if arguments.quick else list(VOCABULARIES))
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    upstream_path = None if arguments.alone else upstream_python(arguments.upstream)
    print(
        f"{arguments.cells} cells, {arguments.rounds} rounds, interleaved; "
        f"{torch.cuda.get_device_name() if on_gpu else f'CPU, {threads} threads for both'}; torch {torch.__version__}"
    )
    head = ["", "cells/s", "tokens/s", "fill", "useful TFLOP/s", "of matmul", "GPU GiB", "rel. RMS", "centred cos"]
    answers = []
    for name in models:
        shape = Shape(name, arguments.scale, layers=2 if small else 12)
        parts = shape.upstream_flops()
        print(
            f"{name}: width {shape.width}, {shape.layers} layers, {shape.vocabulary:,} genes; upstream, in "
            f"batches of {upstream_batch(shape, arguments)}, computes {sum(parts.values()) / 1e9:,.0f} GFLOP a cell: "
            + ", ".join(f"{part} {flops / sum(parts.values()):.0%}" for part, flops in parts.items())
        )
        with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor() as pool:
            folder = Path(place)
            # Upstream imports its libraries meanwhile.
            starting = pool.submit(Upstream, upstream_path, threads) if upstream_path else None
            try:
                shape.build(folder / "checkpoint")
                for median in arguments.medians:
                    upstream = starting.result() if starting else None
                    rows, answer = measure(shape, folder, median, upstream, arguments)
                    table(head, rows)
                    answers.append(answer)
            finally:
                if starting:
                    starting.result().close()
    if arguments.json:
        main_answer = next((a for a in answers if (a["model"], a["median"]) == ("exemplar", 1800)), answers[0])
        kept = {key: main_answer.get(key) for key in ("ours", "reference", "ratio", "predicted_ratio")}
        print(json.dumps({**kept, "unit": "cells/s", "rows": answers}))


if __name__ == "__main__":
    main()
