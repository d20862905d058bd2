"""Reads a whole array with tiledbsoma alone: `python -m tests.support.array_reader URI OUT.npz CONFIG_JSON`."""

import json
import sys

import numpy as np
import tiledbsoma


def main() -> None:
    uri, out, config = sys.argv[1:]
    context = tiledbsoma.SOMATileDBContext(tiledb_config=json.loads(config))
    with tiledbsoma.SparseNDArray.open(uri, context=context) as array:
        table = array.read().tables().concat()
        ids, position = np.unique(table["soma_dim_0"].to_numpy(), return_inverse=True)
        values = np.full((len(ids), array.shape[1]), np.nan, np.float32)
        values[position, table["soma_dim_1"].to_numpy()] = table["soma_data"].to_numpy()
        metadata = {key: value for key, value in array.metadata.items() if isinstance(value, str)}
        stored = {"stored": len(table), "shape": array.shape, "metadata": json.dumps(metadata)}
        np.savez(out, ids=ids, values=values, **stored)


if __name__ == "__main__":
    main()
