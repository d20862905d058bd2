"""Run upstream's own inference with a stopwatch, in upstream's environment. Imports nothing of this project.

    python upstream.py serve                      JSON commands on stdin, one JSON answer a line on stdout
    python upstream.py timed FILE inference ...   upstream's command line; its stages' seconds go to FILE

Nothing of upstream is reimplemented. `serve` calls upstream's `run_inference` on configurations that upstream's command
line makes. It keeps only vocabulary, model and weights from one call to the next, so that it measures a warm model.
Timers wrap upstream's functions and change nothing else. `serve` also waits for the GPU before it reads the clock.
"""

import contextlib
import functools
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SECONDS: Counter[str] = Counter()


def timed(owner: Any, name: str, stage: str, wait: Callable[[], None] = lambda: None) -> None:
    """Add what a function of upstream takes to `SECONDS`."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapper(*arguments: Any, **named: Any) -> Any:
        wait()
        started = time.monotonic()
        # When the first call of a stage began, to tell what lies before it.
        SECONDS.setdefault(f"{stage} began", started)
        try:
            return original(*arguments, **named)
        finally:
            wait()
            SECONDS[stage] += time.monotonic() - started

    setattr(owner, name, wrapper)


def put_timers(wait: Callable[[], None] = lambda: None) -> None:
    """Time upstream's stages: vocabulary, dataset, predict (all of it), compute (the model's part) and save."""
    import anndata
    from transcriptformer.model import inference, model

    timed(inference, "load_vocabs_and_embeddings", "vocabulary")
    timed(inference.AnnDataset, "__init__", "dataset")
    timed(inference.pl.Trainer, "predict", "predict", wait)
    timed(model.Transcriptformer, "predict_step", "compute", wait)
    timed(anndata.AnnData, "write_h5ad", "save")


@functools.cache
def matmul_rate(device: str, precision: str, seconds: float = 1.0) -> float:
    """Return FLOP/s of square matrix products: fp32 on a CPU 2,048 wide, otherwise 8,192."""
    import torch

    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    size = 2048 if device == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best, begun = 0.0, time.monotonic()
    while time.monotonic() - begun < seconds:
        _wait_for_gpu()
        started = time.monotonic()
        for _ in range(4):
            torch.mm(left, right)
        _wait_for_gpu()
        best = max(best, 4 * 2 * size**3 / (time.monotonic() - started))
    return best


def _wait_for_gpu() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


class _ConfigurationError(Exception):
    """Ends upstream's command line where it would start to compute."""


class Server:
    """Upstream's inference, kept warm between commands."""

    def __init__(self) -> None:
        import torch
        from transcriptformer import cli
        from transcriptformer.model import inference, layers, model

        self.cli, self.inference, self.torch = cli, inference, torch
        put_timers(_wait_for_gpu)
        if not torch.cuda.is_available():
            # On a GPU it is compiled, and no timer can stand in it.
            timed(layers, "flex_attention", "attention")
        for owner, name in ((inference, "load_vocabs_and_embeddings"), (torch, "load")):
            setattr(owner, name, _kept(getattr(owner, name)))
        model.Transcriptformer = _kept_model(model.Transcriptformer)

    def hello(self, threads: int) -> dict[str, Any]:
        """Set the number of threads; say what runs here."""
        import transcriptformer

        self.torch.set_num_threads(threads)
        return {"torch": self.torch.__version__, "transcriptformer": Path(transcriptformer.__file__).parent.as_posix()}

    def matmul(self, device: str, precision: str) -> dict[str, Any]:
        """Measure the device."""
        return {"flops_per_second": matmul_rate(device, precision)}

    def tokens(self, checkpoint: str, cells: str, save: str) -> dict[str, Any]:
        """Build upstream's dataset of an h5ad and iterate all of it; reading the file is not timed."""
        import anndata
        import h5py
        import numpy as np
        from transcriptformer.tokenizer.vocab import build_gene_vocab_from_list, open_vocabs

        cfg = self._configuration(["--checkpoint-path", checkpoint, "--data-file", cells])
        data = cfg.model.data_config
        names = []
        for file in data.esm2_mappings:
            with h5py.File(Path(checkpoint) / "vocabs" / file) as opened:
                names += [key.decode() for key in opened["keys"][:]]
        gene_vocab = build_gene_vocab_from_list(names, data.special_tokens)
        aux_vocab = open_vocabs(data.aux_vocab_path, data.aux_cols.split(","))
        adata = anndata.read_h5ad(cells)
        before = _peak_gib()
        cpu, wall = time.process_time(), time.monotonic()
        dataset = self.inference.AnnDataset(
            [adata],
            gene_vocab=gene_vocab,
            aux_vocab=aux_vocab,
            max_len=cfg.model.model_config.seq_len,
            pad_zeros=data.pad_zeros,
            pad_token=data.gene_pad_token,
            sort_genes=data.sort_genes,
            filter_to_vocab=data.filter_to_vocabs,
            filter_outliers=data.filter_outliers,
            gene_col_name=data.gene_col_name,
            normalize_to_scale=data.normalize_to_scale,
            randomize_order=data.randomize_genes,
            min_expressed_genes=data.min_expressed_genes,
            clip_counts=data.clip_counts,
            obs_keys=cfg.model.inference_config.obs_keys,
            remove_duplicate_genes=data.remove_duplicate_genes,
            use_raw=data.use_raw,
        )
        batches = list(self.torch.utils.data.DataLoader(dataset, batch_size=8, collate_fn=dataset.collate_fn))
        cpu, wall = time.process_time() - cpu, time.monotonic() - wall
        name_of = np.array(list(gene_vocab), dtype="S")
        np.savez(
            save,
            genes=name_of[np.concatenate([batch.gene_token_indices.numpy() for batch in batches])],
            counts=np.concatenate([batch.gene_counts.numpy() for batch in batches]),
            assays=np.concatenate([batch.aux_token_indices.numpy() for batch in batches])[:, 0],
        )
        return {"cpu_seconds": cpu, "seconds": wall, "peak_gib_before": before, "peak_gib": _peak_gib()}

    def embed(
        self,
        checkpoint: str,
        cells: str,
        save: str,
        device: str,
        precision: str,
        batch_size: int,
        exact: bool = False,
        autocast: bool = False,
    ) -> dict[str, Any]:
        """Run `run_inference`; seconds by stage.

        `exact`: full float32 products, as a reference on a GPU. `autocast`: fp16 autocast around a run in ``32``, which
        is what ``16-mixed`` does; the trainer refuses that on a CPU.
        """
        import numpy as np

        arguments = ["--checkpoint-path", checkpoint, "--data-file", cells, "--batch-size", str(batch_size)]
        arguments += ["--device", device, "--precision", precision]
        # On a CPU upstream's documentation says so.
        arguments += ["--disable-compile-block-mask"] if device == "cpu" else []
        cfg = self._configuration(arguments)
        usual = self.torch.get_float32_matmul_precision()
        self.torch.set_float32_matmul_precision("highest" if exact else usual)
        if device == "cuda":
            self.torch.cuda.reset_peak_memory_stats()
        SECONDS.clear()
        try:
            with self.torch.autocast(device, dtype=self.torch.float16, enabled=autocast):
                found = self.inference.run_inference(cfg, data_files=[cells])
        finally:
            self.torch.set_float32_matmul_precision(usual)
        np.save(save, np.asarray(found.obsm["embeddings"], np.float32))
        peak = self.torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
        return {
            "compute": SECONDS["compute"],
            "attention": SECONDS["attention"],
            "loading": SECONDS["predict"] - SECONDS["compute"],
            "dataset": SECONDS["dataset"],
            "vocabulary": SECONDS["vocabulary"],
            "gpu_gib": peak,
        }

    def _configuration(self, arguments: list[str]) -> Any:
        """Return the configuration that upstream's command line would run with."""
        found = []

        def capture(cfg: Any, data_files: list[str]) -> None:  # noqa: ARG001
            found.append(cfg)
            raise _ConfigurationError

        self.cli.run_inference = capture
        sys.argv = ["transcriptformer", "inference", *arguments]
        with contextlib.suppress(_ConfigurationError):
            self.cli.main()
        return found[0]


def _kept(function: Callable[..., Any]) -> Callable[..., Any]:
    """Call once and give the same result ever after: a server has one checkpoint."""
    found: list[Any] = []

    @functools.wraps(function, updated=())
    def wrapper(*arguments: Any, **named: Any) -> Any:
        if not found:
            found.append(function(*arguments, **named))
        return found[0]

    return wrapper


def _kept_model(kind: Callable[..., Any]) -> Callable[..., Any]:
    """Construct once; later calls only exchange the configuration of inference, which holds the batch size."""
    construct = _kept(kind)

    def wrapper(**named: Any) -> Any:
        model = construct(**named)
        model.inference_config = named["inference_config"]
        return model

    return wrapper


def _peak_gib() -> float:
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) / 2**20


@contextlib.contextmanager
def _answers_only() -> Iterator[Any]:
    """Yield the real standard output; what upstream and its libraries print goes to standard error."""
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        yield answers


def main() -> None:
    """Serve, or run upstream's command line once."""
    if sys.argv[1] == "serve":
        with _answers_only() as answers:
            server = Server()
            for line in sys.stdin:
                request = json.loads(line)
                answers.write(json.dumps(getattr(server, request.pop("command"))(**request)) + "\n")
        return
    stamps = Path(sys.argv[2])
    sys.argv = ["transcriptformer", *sys.argv[3:]]
    from transcriptformer.cli import main as upstream

    put_timers()
    upstream()
    stamps.write_text(json.dumps({**SECONDS, "ended": time.monotonic()}))


if __name__ == "__main__":
    main()
