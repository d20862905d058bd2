"""Embeds many cells: forms batches, runs the model, refuses values that are not finite."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from census_tf_dagster.errors import UserError
from census_tf_dagster.inference.checkpoint import Checkpoint
from census_tf_dagster.inference.model import Model
from census_tf_dagster.inference.tokens import PackedCells, Tokenizer
from census_tf_dagster.inference.weights import load_model

TOKENS_PER_BATCH = {"cpu": 8192, "cuda": 65536}


class NonFiniteError(ArithmeticError):
    """The model gave NaN or infinity for some cells."""

    def __init__(self, cells: npt.NDArray[np.int64], precision: str) -> None:
        super().__init__(
            f"{len(cells)} cells have embeddings that are not finite in {precision}, positions {cells[:10].tolist()}. "
            "Values may be out of this precision's range: set compute_precision to fp32 or bf16."
        )
        self.cells = cells


def choose_device(device: str) -> torch.device:
    """Resolve a set's `device`.

    Parameters
    ----------
    device
        ``cuda`` or ``cpu``.

    Raises
    ------
    UserError
        When a GPU is asked for and there is none: a GPU-sized job must not crawl on a CPU unnoticed.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "this set asks for a GPU (device: cuda) and this machine has none that torch can use. Run it where one "
            "is, or set `device: cpu` in the set's YAML for a small trial."
        )
    return torch.device(device)


@dataclass(frozen=True)
class Engine:
    """A loaded model, ready to embed.

    Attributes
    ----------
    model
        Weights on the device.
    precision
        The model's compute precision.
    device
        Where it computes.
    batch_size
        Cells in a batch at most; None: as many as `TOKENS_PER_BATCH` admits.
    """

    model: Model
    precision: str
    device: torch.device
    batch_size: int | None

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        tokenizer: Tokenizer,
        *,
        precision: str,
        device: str,
        batch_size: int | None,
    ) -> "Engine":
        """Load a checkpoint for one gene axis."""
        target = choose_device(device)
        return cls(load_model(checkpoint, tokenizer, precision, target), precision, target, batch_size)

    def embed(self, cells: PackedCells) -> npt.NDArray[np.float32]:
        """Embed cells.

        Returns
        -------
        ndarray
            float32 ``(n_cells, embed_dim)``, in the order of `cells`.

        Raises
        ------
        NonFiniteError
            Naming the cells whose values are not finite.
        """
        lengths = cells.lengths()
        embeddings = np.empty((len(lengths), self.model.shape.embed_dim), np.float32)
        for first, last in self._batches(lengths):
            begin, end = cells.offsets[first], cells.offsets[last]
            result = self.model.embed(
                torch.from_numpy(cells.tokens[begin:end]).to(self.device),
                torch.from_numpy(cells.bias[begin:end]).to(self.device),
                torch.from_numpy(cells.offsets[first : last + 1] - begin),
            )
            embeddings[first:last] = result.cpu().numpy()
        wrong = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
        if len(wrong):
            raise NonFiniteError(wrong, self.precision)
        return embeddings

    def _batches(self, lengths: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
        """Yield ranges of consecutive cells that exceed neither the token nor the cell limit."""
        limit = TOKENS_PER_BATCH[self.device.type]
        first, tokens = 0, 0
        for cell, length in enumerate(lengths.tolist()):
            if cell > first and (tokens + length > limit or cell - first == self.batch_size):
                yield first, cell
                first, tokens = cell, 0
            tokens += length
        if first < len(lengths):
            yield first, len(lengths)
