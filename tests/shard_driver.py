"""Runs one shard in a process of its own and says what it does, so that it can be killed at any moment.

    python -m tests.shard_driver PROJECT_FOLDER SET SHARD [SECONDS_BETWEEN_COMMITS]

Prints `computed` when a megabatch left the model, `committed` when it is written, `done` at the end.
"""

import sys
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

from census_tf_dagster.inference.engine import Engine
from census_tf_dagster.inference.tokens import PackedCells
from census_tf_dagster.steps.embedding import embed_shard
from tests.support import Project


def main() -> None:
    folder, name, shard = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    pause = float(sys.argv[4]) if len(sys.argv) > 4 else 0.0
    embed = Engine.embed

    def embed_and_say(self: Engine, cells: PackedCells) -> npt.NDArray[np.float32]:
        result = embed(self, cells)
        print("computed", flush=True)
        time.sleep(pause)
        return result

    Engine.embed = embed_and_say  # type: ignore[method-assign]
    with Project(folder).job(name) as job:
        print("started", flush=True)
        embed_shard(job, shard, report=lambda _: print("committed", flush=True))
    print("done", flush=True)


if __name__ == "__main__":
    main()
