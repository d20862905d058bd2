"""The reader in docs/read.md gives right values and needs little memory."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from census_tf_dagster.identity import Identity
from census_tf_dagster.io.storage import Storage
from census_tf_dagster.store.array import EmbeddingsArray
from tests.support.read_page import reader

CELLS, FEATURES = 6_000, 2048

REPORT = """
import json, resource
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
wanted = np.arange(0, 6_000, 2) if scattered else np.arange(6_000)
with tiledbsoma.open(array_uri, context=context) as array:
    joinids, embeddings = embeddings_of(array, wanted)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
expected = (joinids[:, None] * 4 + np.arange(2048) + 1).astype(np.float32)
print(json.dumps({"joinids": joinids.tolist(), "right": bool((embeddings == expected).all()), "kb": peak - before}))
"""


@pytest.fixture(scope="module")
def array(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write three of every four cells; the fourth is absent."""
    uri, storage = tmp_path_factory.mktemp("page") / "embeddings", Storage()
    identity = Identity(
        census_uri="census",
        census_build_date="2025-11-08",
        organism="homo_sapiens",
        value_filter=None,
        mod=1,
        gene_order="census",
        gene_fingerprint="genes",
        checkpoint_fingerprint="checkpoint",
        compute_precision="fp32",
        storage_precision="float32",
        embedding_dim=FEATURES,
    )
    EmbeddingsArray.create(str(uri), storage, identity, CELLS)
    opened = EmbeddingsArray.open(str(uri), storage, identity)
    ids = np.flatnonzero(np.arange(CELLS) % 4)
    for start in range(0, len(ids), 1500):
        part = ids[start : start + 1500]
        opened.write(part, (part[:, None] * 4 + np.arange(FEATURES) + 1).astype(np.float32))
    return uri


@pytest.mark.parametrize("scattered", [False, True])
def test_the_reader_is_right_and_takes_little_memory(array: Path, scattered: bool) -> None:
    code = f"{reader()}\narray_uri, scattered = {str(array)!r}, {scattered}\n{REPORT}"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["joinids"] == [i for i in range(0, CELLS, 2 if scattered else 1) if i % 4]
    assert found["right"]
    # The values take 37 MB; all tables at once took twenty times as much.
    assert found["kb"] < 400_000
