"""Lets TileDB-Vector-Search cluster projected embeddings into an index, in a process of its own.

The library opens groups in threads that do not know its `config` argument (0.16.0), so TileDB's settings have to be in
the process's environment, where the caller's threads must not see them change.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping

from census_tf_dagster.errors import UserError

VECTORS_AT_ONCE = 131_072
"""This bounds the memory: 128 MiB of vectors, which the library holds several times."""


def cluster(uri: str, projected: str, ids: str, sample: str, partitions: int, config: Mapping[str, str]) -> None:
    """Build the group at `uri`.

    Parameters
    ----------
    uri
        Address of the group, which must not exist.
    projected, ids
        Arrays of the projected embeddings, float32 ``(n_dimensions, n)``, and of the external ids, uint64 ``(n,)``.
    sample
        Local file of NumPy with the vectors to train on, float32 ``(m, n_dimensions)``.
    partitions
        Number of k-means clusters.
    config
        TileDB's configuration, without secrets.

    Raises
    ------
    UserError
        When the process fails.
    """
    settings = {f"TILEDB_{name.upper().replace('.', '_')}": value for name, value in config.items()}
    arguments = {"index_uri": uri, "source_uri": projected, "external_ids_uri": ids, "partitions": partitions}
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-m", __name__, sample, json.dumps(arguments)],
        env={**os.environ, **settings},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise UserError(
            f"the cells could not be clustered: TileDB-Vector-Search ended with {done.returncode}; expected 0. The end "
            f"of its output:\n{done.stdout[-2000:]}"
        )


def main() -> None:
    """Run TileDB-Vector-Search with the arguments of this process."""
    import numpy as np
    from tiledb.vector_search.ingestion import ingest

    ingest(
        "IVF_FLAT",
        source_type="TILEDB_ARRAY",
        external_ids_type="TILEDB_ARRAY",
        training_input_vectors=np.load(sys.argv[1], allow_pickle=False),
        input_vectors_per_work_item=VECTORS_AT_ONCE,
        max_tasks_per_stage=1,
        workers=1,
        **json.loads(sys.argv[2]),
    )


if __name__ == "__main__":
    main()
