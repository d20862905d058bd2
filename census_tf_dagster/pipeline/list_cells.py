"""The cells of a release that a set takes, and what its value filter does not take although it seems to."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from census_tf_dagster.census.cell_keys import KEY_COLUMNS, OPTIONAL_COLUMNS, KeyMaker, Keys, dataset_digests
from census_tf_dagster.census.labels import find_comparisons, joined_labels, read_labels, unknown_labels
from census_tf_dagster.census.release import NNZ, shortened
from census_tf_dagster.errors import UserError
from census_tf_dagster.inference.tokens import genes_in_order
from census_tf_dagster.pipeline.context import ReleaseContext


@dataclass(frozen=True)
class ListedCells:
    """Matching cells, ascending.

    Attributes
    ----------
    joinids
        int64 ``(n,)``.
    tokens
        Tokens of each at most, ``(n,)``; None where obs does not say how many genes cells express.
    zero_counts
        Which of them express no gene, bool ``(n,)``; None as above.
    keys
        By which a later release finds them; None for sets without `reuse`.
    primary
        How many are primary data.
    """

    joinids: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.integer] | None
    zero_counts: npt.NDArray[np.bool_] | None
    keys: Keys | None
    primary: int


def list_cells(context: ReleaseContext) -> ListedCells:
    """List the cells that match the set's filter and `mod`.

    Raises
    ------
    UserError
        When no cell matches, or the filter is not understood.
    """
    settings, window = context.settings, context.checkpoint.shape.seq_len - 1
    make_keys, columns = None, []
    if settings.reuse:
        make_keys = _key_maker(context)
        columns = [*KEY_COLUMNS, context.checkpoint.aux_column] if make_keys else []
        columns += [name for name in OPTIONAL_COLUMNS if make_keys and name in context.release.obs.keys()]  # noqa: SIM118
    # As many as there can be: the system gives memory to what is filled alone.
    most = context.release.cells()
    joinids = np.empty(most, np.int64)
    tokens = np.empty(most, np.min_scalar_type(window + 2)) if context.release.has_nnz else None
    keys = np.zeros((most, 2), np.uint64) if settings.reuse else None
    n = primary = 0
    for table in context.release.iter_obs(settings.value_filter, columns):
        ids = table["soma_joinid"].to_numpy()
        if settings.mod > 1:
            table = table.filter(pa.array(ids % settings.mod == 0))
            ids = table["soma_joinid"].to_numpy()
        part = slice(n, n + len(ids))
        joinids[part] = ids
        if tokens is not None:
            # Assay and START, and the window's genes: an upper bound, as genes outside the vocabulary make no token.
            tokens[part] = np.minimum(table[NNZ].to_numpy(), window) + 2
        primary += pc.sum(table["is_primary_data"]).as_py() or 0
        if keys is not None and make_keys is not None:
            keys[part] = make_keys(table)
        n += len(ids)
    if not n:
        raise UserError(_nothing_matches(context))
    joinids, tokens, keys = joinids[:n], None if tokens is None else tokens[:n], None if keys is None else keys[:n]
    if (joinids[1:] <= joinids[:-1]).any():
        order = np.argsort(joinids, kind="stable")
        joinids, tokens = joinids[order], None if tokens is None else tokens[order]
        keys = None if keys is None else keys[order]
    return ListedCells(joinids, tokens, None if tokens is None else tokens == 2, keys, primary)


def _key_maker(context: ReleaseContext) -> KeyMaker | None:
    """Return what makes keys; None when obs lacks what they are made of: then every cell is computed."""
    if not set(KEY_COLUMNS) <= set(context.release.obs.keys()):
        return None
    seen = genes_in_order(context.genes.ids, context.checkpoint, context.settings.gene_order)
    return KeyMaker(dataset_digests(context.release, context.genes.ids, seen), context.checkpoint.aux_column)


def _nothing_matches(context: ReleaseContext) -> str:
    settings, release = context.settings, context.release
    asked = shortened(settings.value_filter) if settings.value_filter else "None"
    comparisons = find_comparisons(settings.value_filter) if settings.value_filter else []
    unknown = unknown_labels(comparisons, read_labels(release, {one.column for one in comparisons}))
    why = f" In it, {'; '.join(unknown[:2])}." if unknown else ""
    return (
        f"no cell of {settings.organism} in {release.uri} matches value_filter {asked} with mod {settings.mod}."
        f"{why} The organism has {release.cells():,} cells."
    )


def filter_warnings(context: ReleaseContext, cells: int) -> list[str]:
    """Say which labels of the set's filter obs does not have, and which cells with joined labels escape the filter.

    Parameters
    ----------
    context
        The opened set and release.
    cells
        How many cells the filter takes, with the set's `mod`.
    """
    settings = context.settings
    if not settings.value_filter:
        return []
    comparisons = find_comparisons(settings.value_filter)
    labels = read_labels(context.release, {one.column for one in comparisons})

    def count(value_filter: str) -> int:
        tables = context.release.obs.read(value_filter=value_filter, column_names=["soma_joinid"])
        return sum(int((table["soma_joinid"].to_numpy() % settings.mod == 0).sum()) for table in tables)

    unknown = [f"value_filter: {one}" for one in unknown_labels(comparisons, labels)]
    return [*unknown, *joined_labels(comparisons, labels, cells, count)]
