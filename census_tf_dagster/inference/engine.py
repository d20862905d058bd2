"""Embeds cells on one device: packs rows, keeps the device busy, and chooses its row length from free memory.

On CUDA, rows have a fixed length and two are in progress at once: while the device computes one, the next is packed and
copied. When memory runs out, the engine halves the row length and keeps the rows that are done.

The forward pass belongs in `model`, the choice of cells for a row in `packing`.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from census_tf_dagster.errors import UserError
from census_tf_dagster.inference.attention import MASK_BLOCK, TRITON
from census_tf_dagster.inference.attention_choice import choose_kernel, first_line, without_flash
from census_tf_dagster.inference.cell_errors import NonFiniteError
from census_tf_dagster.inference.gpu import choose_device, is_lost, require_compiler, too_small
from census_tf_dagster.inference.model import Model
from census_tf_dagster.inference.non_finite import NonFiniteCells, RowResult
from census_tf_dagster.inference.packing import PackedCells, Row, assemble, choose_cells
from census_tf_dagster.inference.prepared_checkpoint import load_model

LONGEST_ROW = {"cpu": 8192, "cuda": 65536}
"""Most tokens in a row. With more, kernels gain nothing."""
MEMORY_SHARE = 0.5
"""Share of the free memory that a row may take by estimate. It is not 1, because allocators round up."""
LEAST_HEAD_DIM = 16
"""Least width of attention heads on CUDA. FlexAttention refuses narrower ones."""


@dataclass
class Counters:
    """Totals of an engine.

    Attributes
    ----------
    busy
        Seconds in which the device computed or copied.
    packing
        Seconds spent on choosing and assembling rows, while the device computed others.
    tokens, row_tokens
        Tokens embedded, and tokens computed for them, which on CUDA include the padding of whole rows.
    rows
        Number of rows.
    halvings
        Number of times that memory ran out.
    """

    busy: float = 0.0
    packing: float = 0.0
    tokens: int = 0
    row_tokens: int = 0
    rows: int = 0
    halvings: int = 0


@dataclass(eq=False)
class PendingCells:
    """Cells on their way through an engine.

    Attributes
    ----------
    packed
        Their tokens.
    embeddings
        float32 ``(n_cells, embed_dim)``, NaN for cells that are set aside. Valid when `left` is 0 and `failure` is
        None.
    left
        Number of cells that are not embedded yet.
    failure
        The reason if none of these cells could be embedded.
    set_aside
        The reason for each cell without an embedding, by its position.
    widened
        Positions, ascending, of the cells whose values left the precision's range and were computed in float32.
    """

    packed: PackedCells
    embeddings: npt.NDArray[np.float32]
    left: int
    failure: Exception | None = None
    set_aside: dict[int, str] = field(default_factory=dict)
    widened: list[int] = field(default_factory=list)
    waiting: deque[npt.NDArray[np.int64]] = field(default_factory=deque)


@dataclass(frozen=True)
class _UnderWay:
    work: PendingCells
    row: Row
    length: int | None
    result: Tensor
    began: "torch.cuda.Event | float"
    ended: "torch.cuda.Event | float"


class Engine:
    """A loaded model that embeds the added cells in order.

    Parameters
    ----------
    model, precision
        The model, and the precision in which it computes.
    batch_size
        Most cells in a row; None: as many as fit.
    load_wider
        Loads the model in float32, for cells whose values leave the precision's range; None if `precision` is float32.
    """

    def __init__(
        self,
        model: Model,
        precision: str,
        batch_size: int | None = None,
        load_wider: Callable[[], Model] | None = None,
    ) -> None:
        self.model = model
        self.batch_size = batch_size
        self.counters = Counters()
        self._cuda = model.device.type == "cuda"
        if self._cuda and (width := model.shape.embed_dim // model.shape.num_heads) < LEAST_HEAD_DIM:
            raise UserError(
                f"the model's attention heads are {width} wide; expected {LEAST_HEAD_DIM} or more on a GPU: set "
                "`device: cpu` in the set's YAML, or use another checkpoint."
            )
        longest_cell = model.shape.seq_len + 1
        self._shortest_row = -(-longest_cell // MASK_BLOCK) * MASK_BLOCK
        self.row_length = self._choose_row_length()
        self._recompute = NonFiniteCells(model, precision, load_wider, self._shortest_row)
        self._works: deque[PendingCells] = deque()
        self._under_way: deque[_UnderWay] = deque()

    @classmethod
    def load(cls, prepared: Path, genes: Sequence[str], device: str, batch_size: int | None = None) -> "Engine":
        """Load a prepared checkpoint for one gene axis; see `load_model` for `prepared` and `genes`.

        Raises
        ------
        UserError
            When there is no such device, its memory is too small, or this machine cannot build kernels for it.
        """
        target = choose_device(device)
        if target.type == "cuda":
            # Events, streams and pinned memory belong to the current device.
            torch.cuda.set_device(target)
            require_compiler()

        def load_wider() -> Model:
            return load_model(prepared, genes, target, torch.float32)[0]

        try:
            model, precision = load_model(prepared, genes, target)

            def warm(model: Model) -> "Engine":
                engine = cls(model, precision, batch_size, load_wider if precision != "fp32" else None)
                engine._warm_up()
                return engine

            if target.type == "cpu":
                return warm(model)
            shape = model.shape
            head_dim = shape.embed_dim // shape.num_heads
            kernel = choose_kernel(target, model.table[0].dtype, shape.num_heads, head_dim, shape.softcap)
            try:
                return warm(replace(model, kernel=kernel))
            except Exception as error:
                if kernel is TRITON or is_lost(error) or isinstance(error, (torch.OutOfMemoryError, UserError)):
                    raise
                return warm(replace(model, kernel=without_flash(first_line(error))))
        except torch.OutOfMemoryError as error:
            raise too_small(target) from error.with_traceback(None)

    def embed(self, cells: PackedCells) -> npt.NDArray[np.float32]:
        """Embed cells and wait for the result.

        Returns
        -------
        ndarray
            float32 ``(n_cells, embed_dim)``, in the order of `cells`.

        Raises
        ------
        NonFiniteError
            When cells were set aside, with their positions.
        """
        done = self._finish(cells)
        if done.set_aside:
            raise NonFiniteError(done.set_aside)
        return done.embeddings

    def _finish(self, cells: PackedCells) -> PendingCells:
        self.add(cells)
        while (done := self.step()) is None:
            pass
        if done.failure:
            raise done.failure
        return done

    def add(self, cells: PackedCells) -> PendingCells:
        """Queue cells; `step` embeds them."""
        n = len(cells.lengths())
        work = PendingCells(cells, np.empty((n, self.model.shape.embed_dim), np.float32), n)
        began = time.monotonic()
        work.waiting.extend(choose_cells(cells.lengths(), self.row_length, self.batch_size))
        self.counters.packing += time.monotonic() - began
        self._works.append(work)
        return work

    @property
    def hungry(self) -> bool:
        """Whether no row is queued, so that the device becomes idle unless cells are added."""
        return not any(work.waiting for work in self._works)

    @property
    def finishing(self) -> bool:
        """Whether the next step may complete a `PendingCells`."""
        work = next((work for work in self._works if work.waiting), None)
        return work is None or len(work.waiting) == 1

    @property
    def idle(self) -> bool:
        """Whether `step` has returned everything that was added."""
        return not self._works

    def step(self) -> PendingCells | None:
        """Advance by one row; return a `PendingCells` if all its cells are embedded or have failed, otherwise None.

        Raises
        ------
        torch.AcceleratorError
            When the device is lost.
        """
        work = next((work for work in self._works if work.waiting), None)
        if work is not None:
            self._launch(work)
        if self._under_way and (work is None or len(self._under_way) > 1 or not self._cuda):
            self._collect(self._under_way.popleft())
        if self._works and not self._works[0].left and not any(row.work is self._works[0] for row in self._under_way):
            return self._works.popleft()
        return None

    def _launch(self, work: PendingCells) -> None:
        began_packing = time.monotonic()
        row = assemble(work.packed, work.waiting.popleft())
        self.counters.packing += time.monotonic() - began_packing

        length = self.row_length if self._cuda else None

        def launch() -> None:
            began = self._now()
            result = self.model.embed(row, length)
            if self._cuda:
                on_host = torch.empty(result.shape, dtype=result.dtype, pin_memory=True)
                result = on_host.copy_(result, non_blocking=True)
            self._under_way.append(_UnderWay(work, row, length, result, began, self._now()))

        self._attempt(work, row, launch)

    def _collect(self, done: _UnderWay) -> None:
        if isinstance(done.ended, torch.cuda.Event):
            done.ended.synchronize()
        self.counters.busy += _seconds_between(done.began, done.ended)
        self.counters.tokens += len(done.row.tokens)
        self.counters.row_tokens += done.length or len(done.row.tokens)
        self.counters.rows += 1
        work, embeddings = done.work, done.result.numpy()
        if work.failure:
            return
        if np.isfinite(embeddings).all():
            self._take(work, done.row, RowResult(embeddings))
            return

        def recompute() -> None:
            began = time.monotonic()
            result = self._recompute(done.row, embeddings, done.length)
            self.counters.busy += time.monotonic() - began
            self._take(work, done.row, result)

        self._attempt(work, done.row, recompute)

    def _take(self, work: PendingCells, row: Row, result: RowResult) -> None:
        work.embeddings[row.cells] = result.embeddings
        work.left -= len(row.cells)
        if result.set_aside or result.widened:
            work.set_aside = dict(sorted({**work.set_aside, **result.set_aside}.items()))
            work.widened = sorted([*work.widened, *result.widened])

    def _attempt(self, work: PendingCells, row: Row, compute: Callable[[], None]) -> None:
        """Compute for a row; shorten rows if memory runs out, and fail all of `work` on any other error."""
        try:
            compute()
        except torch.OutOfMemoryError as error:
            self._halve(work, row, error)
        except Exception as error:
            if is_lost(error):
                raise
            self._fail(work, error)

    def _fail(self, work: PendingCells, error: Exception) -> None:
        # The traceback of the error would keep the row's activations alive.
        work.failure = error.with_traceback(None)
        work.waiting.clear()
        work.left = 0

    def _halve(self, work: PendingCells, row: Row, error: Exception) -> None:
        """Pack all waiting cells, this row first, into rows half as long."""
        # The traceback would keep the row's activations alive.
        error = error.with_traceback(None)
        while self._under_way:
            self._collect(self._under_way.popleft())
        torch.cuda.empty_cache()
        if work.failure:
            return
        if self.row_length <= self._shortest_row:
            self._fail(work, error)
            return
        self.counters.halvings += 1
        self.row_length = max(self.row_length // 2 // MASK_BLOCK * MASK_BLOCK, self._shortest_row)
        work.waiting.appendleft(row.cells)
        for pending in self._works:
            if pending.waiting:
                cells = np.concatenate(list(pending.waiting))
                chosen = choose_cells(pending.packed.lengths()[cells], self.row_length, self.batch_size)
                pending.waiting = deque(np.sort(cells[positions]) for positions in chosen)

    def peak_bytes(self) -> int:
        """Return the largest amount of GPU memory that tensors took at once, in bytes; 0 on a CPU."""
        return torch.cuda.max_memory_allocated(self.model.device) if self._cuda else 0

    def _warm_up(self) -> None:
        """Compile, and find out whether the row length fits the memory, before there are cells to embed."""
        if not self._cuda:
            return
        length = self.model.shape.seq_len + 1
        cells = self.row_length // length
        tokens = np.full(cells * length, self.model.pooled_from, np.int32)
        # No Census has such cells, so the result does not matter.
        self._finish(PackedCells(tokens, np.zeros(len(tokens), np.float32), np.arange(cells + 1) * length))
        self.counters = Counters(halvings=self.counters.halvings)

    def _now(self) -> "torch.cuda.Event | float":
        if not self._cuda:
            return time.monotonic()
        # The event blocks, because spinning would take a core from reading and writing.
        event = torch.cuda.Event(enable_timing=True, blocking=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _choose_row_length(self) -> int:
        length = LONGEST_ROW[self.model.device.type]
        if self.batch_size:
            length = min(length, self.batch_size * self._shortest_row)
        length = max(length, self._shortest_row)
        if self._cuda:
            free, _ = torch.cuda.mem_get_info(self.model.device)
            budget = free * MEMORY_SHARE / bytes_per_token(self.model)
            while length > budget and length > self._shortest_row:
                length = max(length // 2 // MASK_BLOCK * MASK_BLOCK, self._shortest_row)
        return length


def bytes_per_token(model: Model) -> int:
    """Estimate the bytes per token of a row: the largest set of activations that live at once."""
    dim, hidden = model.shape.embed_dim, model.shape.model_dim
    activations = 2 * 4 * dim + 3 * dim + 2 * hidden
    return activations * model.table[0].element_size()


def _seconds_between(began: "torch.cuda.Event | float", ended: "torch.cuda.Event | float") -> float:
    if isinstance(began, float) or isinstance(ended, float):
        return float(ended) - float(began)  # type: ignore[arg-type]
    return float(began.elapsed_time(ended)) / 1000
