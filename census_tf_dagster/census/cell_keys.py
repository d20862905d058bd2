"""Makes a key for each cell. Two releases have equal keys only for cells that look the same to the model.

The key is a hash of 128 bits over everything that the rule of reuse compares: the dataset and its version, the cell's
`observation_joinid`, its assay, the numbers of its counts (`nnz`, `raw_sum`), and the genes of its dataset in the order
in which the model sees them. Two releases can therefore be compared without the earlier Census, which may be deleted.
Among 200 million cells, two keys are equal by chance with a probability of 1e-22.

Writing keys to a file and looking them up belongs in `key_file`.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from census_tf_dagster.census.release import OrganismRelease
from census_tf_dagster.io.compiled import compiled

Keys = npt.NDArray[np.uint64]
"""uint64 ``(n, 2)``. Two zeros: the cell has no key, so it is computed."""

JOINID = "observation_joinid"
KEY_COLUMNS = ("dataset_id", JOINID, "nnz")
OPTIONAL_COLUMNS = ("raw_sum",)
"""Columns that some releases lack. A key that includes such a column never equals a key without it."""

_ROWS_AT_ONCE = 2**20


def dataset_digests(release: OrganismRelease, gene_ids: Sequence[str], seen: Sequence[str]) -> dict[str, bytes]:
    """Hash each dataset's part of the keys: its id, its version, and its genes in the order the model sees them.

    Parameters
    ----------
    release
        The release that has the table of datasets and the presence matrix.
    gene_ids
        The gene axis in `var` order.
    seen
        The genes of that axis that get a token, in the order in which the model sees them.

    Returns
    -------
    dict
        16 bytes by dataset id. A dataset is left out if it has no version or no gene in the presence matrix; its cells
        are computed. Without a presence matrix, every dataset counts as having the whole axis.
    """
    versions = release.dataset_versions()
    column_of = {gene: column for column, gene in enumerate(gene_ids)}
    columns = np.array([column_of[gene] for gene in seen], dtype=np.int64)
    names = np.frombuffer(b"".join(_digest(gene) for gene in seen), dtype="V16")
    rows = 1 + max((row for row, _ in versions.values()), default=-1)
    presence = release.presence(rows, len(gene_ids))
    found = {}
    for dataset, (row, version) in versions.items():
        genes = names if presence is None else names[presence[row, columns]]
        if len(genes):
            found[dataset] = _digest(dataset, version, genes.tobytes())
    return found


class KeyMaker:
    """Makes the keys of cells from their obs.

    Parameters
    ----------
    datasets
        The result of `dataset_digests`.
    assay_column
        The obs column that the model gets besides the counts.
    """

    def __init__(self, datasets: Mapping[str, bytes], assay_column: str) -> None:
        self.datasets = datasets
        self.assay_column = assay_column

    def __call__(self, table: pa.Table) -> Keys:
        """Return the keys of some rows of obs, uint64 ``(n, 2)``; a row is zeros if a part of its key is missing."""
        keys = np.zeros((len(table), 2), np.uint64)
        start = 0
        for batch in table.to_batches(max_chunksize=_ROWS_AT_ONCE):
            part = keys[start : start + len(batch)]
            dataset, dataset_digest = _encode(batch["dataset_id"], lambda name: self.datasets.get(name, b""))
            assay, assay_digest = _encode(batch[self.assay_column], lambda name: _digest(name) if name else b"")
            joinids = batch[JOINID].cast(pa.large_string()).fill_null("")
            # A sliced array shares its buffers with the whole one, so the offset matters.
            offsets = np.frombuffer(joinids.buffers()[1], np.int64)[joinids.offset : joinids.offset + len(batch) + 1]
            text = joinids.buffers()[2]
            numbers = np.zeros((len(batch), 1 + len(OPTIONAL_COLUMNS)), np.uint64)
            numbers[:, 0] = batch["nnz"].to_numpy().astype(np.int64).view(np.uint64)
            for column, name in enumerate(OPTIONAL_COLUMNS, start=1):
                if name in batch.schema.names:
                    values = batch[name].to_numpy(zero_copy_only=False).astype(np.float64)
                    numbers[:, column] = values.view(np.uint64) | np.uint64(1)
            data = np.frombuffer(text, np.uint8) if text is not None else np.empty(0, np.uint8)
            _absorb(dataset, dataset_digest, assay, assay_digest, offsets, data, numbers, part)
            start += len(batch)
        return keys


def _digest(*parts: str | bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part.encode() if isinstance(part, str) else part
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.digest()


def _encode(column: pa.Array, digest_of):  # type: ignore[no-untyped-def]
    """Return codes, int32, and the digest of each code, uint64 ``(codes, 2)``; the last code means a missing value."""
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    names = column.dictionary.to_pylist()
    digests = np.zeros((len(names) + 1, 2), np.uint64)
    for code, name in enumerate(names):
        if found := digest_of(name or ""):
            digests[code] = np.frombuffer(found, np.uint64)
    codes = column.indices.cast(pa.int32()).fill_null(len(names)).to_numpy()
    return codes, digests


@compiled(inline="always")
def _mix(x):  # type: ignore[no-untyped-def]
    """Apply splitmix64's finalizer: a bijection in which each input bit changes half of the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@compiled()
def _absorb(dataset, dataset_digest, assay, assay_digest, offsets, data, numbers, keys):  # type: ignore[no-untyped-def]
    """Hash each row into two 64-bit chains that start from different values and mix words differently."""
    for row in range(len(dataset)):
        first, last = offsets[row], offsets[row + 1]
        a, b = dataset_digest[dataset[row], 0], dataset_digest[dataset[row], 1]
        c, d = assay_digest[assay[row], 0], assay_digest[assay[row], 1]
        if last == first or (a | b) == 0 or (c | d) == 0:
            continue
        a, b = _mix(a ^ c), _mix(b + d * np.uint64(0x9E3779B97F4A7C15))
        n_words = (last - first + 7) // 8
        # The length of the text comes first, so that the end of a text cannot be mistaken for the numbers after it.
        for word in range(-1, n_words + numbers.shape[1]):
            if word < 0:
                x = np.uint64(last - first)
            elif word < n_words:
                x = np.uint64(0)
                start = first + 8 * word
                for at in range(start, min(start + 8, last)):
                    x = (x << np.uint64(8)) | np.uint64(data[at])
            else:
                x = numbers[row, word - n_words]
            a = _mix(a ^ x)
            b = _mix(b + (x ^ np.uint64(0x2545F4914F6CDD1D)) * np.uint64(0x9E3779B97F4A7C15))
        keys[row, 0], keys[row, 1] = a, b
