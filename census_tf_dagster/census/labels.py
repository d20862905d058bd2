"""Finds labels in a value filter that are misleading: joined labels, and labels that obs does not have.

Since 2025, a cell may have several labels in one column. The release sorts them and joins them by `` || ``, as in
``COVID-19 || pneumonia``. A filter ``disease == 'COVID-19'`` does not match such a cell.

Applying a filter belongs in `release`.
"""

import ast
import copy
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from census_tf_dagster.census.release import OrganismRelease, shortened
from census_tf_dagster.config.filters import parse_filter

SEPARATOR = "||"
MOST_LABELS = 10_000
"""Most distinct values of a plain text column. A column with more holds names of cells, not labels."""

_NEAREST = 3


@dataclass(frozen=True)
class Comparison:
    """One comparison of a column with labels in a value filter.

    Attributes
    ----------
    column, labels
        As written in the filter.
    chosen
        Whether the comparison selects these labels (``==``, ``in``) or leaves them out (``!=``, ``not in``).
    tree, node
        The whole filter, parsed, and the comparison in it.
    """

    column: str
    labels: tuple[str, ...]
    chosen: bool
    tree: ast.Expression
    node: ast.Compare

    def with_labels(self, labels: Sequence[str]) -> str:
        """Return the whole filter with other labels in this comparison."""
        operator = ast.In() if self.chosen else ast.NotIn()
        left, right = self.node.left, self.node.comparators[0]
        values = ast.List([ast.Constant(label) for label in labels], ast.Load())
        other = ast.Compare(left if _attribute(left) else right, [operator], [values])
        # The memo tells deepcopy that it has already copied this node, so it inserts the new comparison.
        return ast.unparse(copy.deepcopy(self.tree, {id(self.node): other}))


def find_comparisons(value_filter: str) -> list[Comparison]:
    """Return the comparisons of columns with text in a filter. SOMA must have accepted the filter."""
    tree = parse_filter(value_filter.strip())
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Compare) or len(node.ops) != 1:
            continue
        left, right = node.left, node.comparators[0]
        column = _attribute(left) or _attribute(right)
        value = right if _attribute(left) else left
        chosen = isinstance(node.ops[0], ast.Eq | ast.In)
        if column is None or not (chosen or isinstance(node.ops[0], ast.NotEq | ast.NotIn)):
            continue
        labels = [_constant(element) for element in (value.elts if isinstance(value, ast.List) else [value])]
        texts = tuple(label for label in labels if isinstance(label, str))
        if texts and len(texts) == len(labels):
            found.append(Comparison(column, texts, chosen, tree, node))
    return found


def _attribute(node: ast.expr) -> str | None:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "attr":
        name = _constant(node.args[0])
        return name if isinstance(name, str) else None
    return node.id if isinstance(node, ast.Name) else None


def _constant(node: ast.expr) -> object:
    if isinstance(node, ast.Call) and node.args:
        node = node.args[0]
    return node.value if isinstance(node, ast.Constant) else None


def read_labels(release: OrganismRelease, columns: set[str]) -> dict[str, list[str]]:
    """Return the labels of each of these obs columns that holds labels; dictionary columns need metadata only."""
    schema = release.obs.schema
    found = {}
    for column in columns & set(schema.names):
        kind = schema.field(column).type
        if pa.types.is_dictionary(kind) and pa.types.is_large_string(kind.value_type):
            found[column] = release.obs.get_enumeration_values([column])[column].to_pylist()
        elif pa.types.is_large_string(kind):
            labels: set[str] = set()
            for table in release.obs.read(column_names=[column]):
                labels.update(label for label in pc.unique(table[column]).to_pylist() if label is not None)
                if len(labels) > MOST_LABELS:
                    break
            else:
                found[column] = sorted(labels)
    return found


def unknown_labels(comparisons: Sequence[Comparison], labels: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a message for each label of a filter that its column does not have, with the nearest existing labels."""
    said = []
    for comparison in comparisons:
        if comparison.column not in labels:
            continue
        known = {label.lower(): label for label in labels[comparison.column]}
        for label in dict.fromkeys(comparison.labels):
            if label in known.values():
                continue
            near = difflib.get_close_matches(label.lower(), list(known), n=_NEAREST)
            near = near or [other for other in known if label.lower() in other][:_NEAREST]
            nearest = f"; the nearest are {', '.join(repr(known[other]) for other in near)}" if near else ""
            said.append(f"no cell has {comparison.column} {shortened(label)}{nearest}")
    return list(dict.fromkeys(said))


def joined_labels(
    comparisons: Sequence[Comparison], labels: Mapping[str, Sequence[str]], cells: int, count: Callable[[str], int]
) -> list[str]:
    """Return a message for each comparison that misses joined labels, with a filter that includes them.

    Parameters
    ----------
    comparisons
        The comparisons of the filter.
    labels
        Labels by column, the result of `read_labels`.
    cells
        Number of cells that the filter selects.
    count
        Returns the number of cells that another filter selects.
    """
    said = []
    for comparison in comparisons:
        wanted = [_parts(label) for label in comparison.labels]
        joined = [
            label
            for label in labels.get(comparison.column, ())
            if label not in comparison.labels and any(parts < _parts(label) for parts in wanted)
        ]
        if not joined:
            continue
        wider = comparison.with_labels([*comparison.labels, *joined])
        if not (difference := abs(count(wider) - cells)):
            continue
        does, aim = ("misses", "To take them") if comparison.chosen else ("keeps", "To leave them out")
        said.append(
            f"value_filter: `{ast.unparse(comparison.node)[:160]}` {does} {difference:,} cells whose "
            f"{comparison.column} joins that label with others, such as {joined[0]!r}. {aim} too, write: {wider}"
        )
    return said


def _parts(label: str) -> frozenset[str]:
    return frozenset(part.strip() for part in label.split(SEPARATOR))
