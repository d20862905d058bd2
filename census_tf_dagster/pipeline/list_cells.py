"""Lists the cells of a release that a set selects, and warns of labels that its value filter misses.

Parsing labels in a filter belongs in `census.labels`, dividing the cells in `census.division`.
"""

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
        Largest possible number of tokens of each, ``(n,)``; None if obs does not state how many genes cells express.
    zero_counts
        Which cells express no gene, bool ``(n,)``; None if obs does not state it.
    keys
        Keys with which a later release finds these cells, uint64 ``(n, 2)``; None for sets without `reuse`.
    primary
        Number of cells that are primary data.
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
    # The arrays have room for all cells. The system allocates memory only for the part that is filled.
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
            # Assay, START and the window's genes are an upper bound, because unknown genes make no token.
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
    """Return the maker of keys; None if obs lacks a column that keys need. Then every cell is computed."""
    if not set(KEY_COLUMNS) <= set(context.release.obs.keys()):
        return None
    seen = genes_in_order(context.genes.ids, context.checkpoint, context.settings.gene_order)
    return KeyMaker(dataset_digests(context.release, context.genes.ids, seen), context.checkpoint.aux_column)


def _nothing_matches(context: ReleaseContext) -> str:
    settings, release = context.settings, context.release
    asked = shortened(settings.value_filter) if settings.value_filter else "None"
    comparisons = find_comparisons(settings.value_filter) if settings.value_filter else []
    unknown = unknown_labels(comparisons, read_labels(release, {comparison.column for comparison in comparisons}))
    why = f" In it, {'; '.join(unknown[:2])}." if unknown else ""
    return (
        f"no cell of {settings.organism} in {release.uri} matches value_filter {asked} with mod {settings.mod}."
        f"{why} Expected some of the organism's {release.cells():,} cells: correct the set's `value_filter` or `mod`."
    )


def filter_warnings(context: ReleaseContext, cells: int) -> list[str]:
    """Return warnings about labels of the set's filter that obs does not have, and about joined labels that it misses.

    Parameters
    ----------
    context
        The opened set and release.
    cells
        Number of cells that the filter selects, with the set's `mod`.
    """
    settings = context.settings
    if not settings.value_filter:
        return []
    comparisons = find_comparisons(settings.value_filter)
    labels = read_labels(context.release, {comparison.column for comparison in comparisons})

    def count(value_filter: str) -> int:
        tables = context.release.obs.read(value_filter=value_filter, column_names=["soma_joinid"])
        return sum(int((table["soma_joinid"].to_numpy() % settings.mod == 0).sum()) for table in tables)

    unknown = [f"value_filter: {message}" for message in unknown_labels(comparisons, labels)]
    return [*unknown, *joined_labels(comparisons, labels, cells, count)]
