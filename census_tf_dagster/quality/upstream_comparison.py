"""Compares a few cells of a shard's array with the values of upstream's own code, and stores the result.

Running upstream belongs in `pipeline.upstream`, deciding about the result in `verdicts`.
"""

import json
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from census_tf_dagster.io.storage import Storage

NOT_INSTALLED = "transcriptformer is not installed on the worker; docs/quality.md explains how to install it."


@dataclass(frozen=True)
class UpstreamComparison:
    """The comparison of one shard.

    Attributes
    ----------
    shard
        Number of the shard.
    joinids
        Joinids of the compared cells.
    worst_cell
        Largest ||array - upstream|| / ||upstream|| of a cell.
    relative_rms
        The same ratio over all values of all cells.
    centred_cosine
        Smallest cosine after subtracting upstream's mean cell. It means little for so few cells.
    bound
        Largest allowed `worst_cell` at the set's precisions.
    seconds
        Seconds from upstream's start to its answer.
    not_done
        The reason if nothing could be compared; otherwise empty.
    """

    shard: int
    joinids: tuple[int, ...]
    bound: float
    worst_cell: float = 0.0
    relative_rms: float = 0.0
    centred_cosine: float = 0.0
    seconds: float = 0.0
    not_done: str = ""

    @classmethod
    def compare(
        cls,
        shard: int,
        joinids: npt.NDArray[np.int64],
        ours: npt.NDArray[np.float32],
        upstreams: npt.NDArray[np.float32],
        bound: float,
        seconds: float,
    ) -> "UpstreamComparison":
        """Compare two arrays of embeddings, both float32 ``(n_cells, n_features)``."""
        norms = np.linalg.norm(upstreams, axis=1)
        centre = upstreams.mean(axis=0)
        a, b = ours - centre, upstreams - centre
        lengths = np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), np.finfo(np.float32).tiny)
        return cls(
            shard=shard,
            joinids=tuple(joinids.tolist()),
            bound=bound,
            worst_cell=float((np.linalg.norm(ours - upstreams, axis=1) / norms).max()),
            relative_rms=float(np.linalg.norm(ours - upstreams) / np.linalg.norm(upstreams)),
            centred_cosine=float(((a * b).sum(axis=1) / lengths).min()) if len(joinids) > 1 else 1.0,
            seconds=seconds,
        )

    def write(self, storage: Storage, uri: str) -> None:
        """Store the comparison."""
        storage.write(uri, json.dumps(asdict(self)).encode())

    @classmethod
    def read(cls, storage: Storage, uri: str) -> "UpstreamComparison | None":
        """Return the stored comparison; None if there is no readable one."""
        if not storage.exists(uri):
            return None
        try:
            content = json.loads(storage.read(uri))
            return cls(**{**content, "joinids": tuple(content["joinids"])})
        except (ValueError, TypeError, KeyError):
            return None
