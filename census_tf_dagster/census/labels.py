"""Labels in a value filter that do not mean what they seem to: joined labels, and labels that obs does not have.

Releases since 2025 join the labels of a cell that has several by `` || ``, sorted: ``COVID-19 || pneumonia``. A filter
``disease == 'COVID-19'`` does not match such a cell.
"""

import ast
import copy
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from census_tf_dagster.census.release import OrganismRelease, shortened

SEPARATOR = "||"
MOST_LABELS = 10_000
"""Distinct values of a plain text column that are looked at: above, the column holds names of cells, not labels."""

_NEAREST = 3


@dataclass(frozen=True)
class Comparison:
    """One comparison of a column with labels in a value filter.

    Attributes
    ----------
    column, labels
        As the filter has them.
    chosen
        Whether the comparison takes these labels (``==``, ``in``) or leaves them out (``!=``, ``not in``).
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
        # What deepcopy believes to have copied already, it puts in place of the original.
        return ast.unparse(copy.deepcopy(self.tree, {id(self.node): other}))


def find_comparisons(value_filter: str) -> list[Comparison]:
    """Return the comparisons with text in a filter that SOMA has accepted."""
    tree = ast.parse(value_filter.strip(), mode="eval")
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
        labels = [_constant(one) for one in (value.elts if isinstance(value, ast.List) else [value])]
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
    """Return the labels of those columns of obs that hold labels; of dictionary-encoded ones from metadata alone."""
    schema = release.obs.schema
    found = {}
    for column in columns & set(schema.names):
        kind = schema.field(column).type
        if pa.types.is_dictionary(kind) and pa.types.is_large_string(kind.value_type):
            found[column] = release.obs.get_enumeration_values([column])[column].to_pylist()
        elif pa.types.is_large_string(kind):
            labels: set[str] = set()
            for table in release.obs.read(column_names=[column]):
                labels.update(one for one in pc.unique(table[column]).to_pylist() if one is not None)
                if len(labels) > MOST_LABELS:
                    break
            else:
                found[column] = sorted(labels)
    return found


def unknown_labels(comparisons: Sequence[Comparison], labels: Mapping[str, Sequence[str]]) -> list[str]:
    """Return a sentence for each label of a filter that its column does not have, with the nearest that it has."""
    said = []
    for one in comparisons:
        if one.column not in labels:
            continue
        known = {label.lower(): label for label in labels[one.column]}
        for label in dict.fromkeys(one.labels):
            if label in known.values():
                continue
            near = difflib.get_close_matches(label.lower(), list(known), n=_NEAREST)
            near = near or [other for other in known if label.lower() in other][:_NEAREST]
            nearest = f"; the nearest are {', '.join(repr(known[other]) for other in near)}" if near else ""
            said.append(f"no cell has {one.column} {shortened(label)}{nearest}")
    return list(dict.fromkeys(said))


def joined_labels(
    comparisons: Sequence[Comparison], labels: Mapping[str, Sequence[str]], cells: int, count: Callable[[str], int]
) -> list[str]:
    """Return a sentence for each comparison that joined labels escape, with the filter that would not let them.

    Parameters
    ----------
    comparisons
        Of the filter.
    labels
        By column, as `read_labels` gives them.
    cells
        Cells that the filter takes.
    count
        Tells how many another filter takes.
    """
    said = []
    for one in comparisons:
        wanted = [_parts(label) for label in one.labels]
        joined = [
            label
            for label in labels.get(one.column, ())
            if label not in one.labels and any(parts < _parts(label) for parts in wanted)
        ]
        if not joined:
            continue
        wider = one.with_labels([*one.labels, *joined])
        if not (difference := abs(count(wider) - cells)):
            continue
        does, aim = ("misses", "To take them") if one.chosen else ("keeps", "To leave them out")
        said.append(
            f"value_filter: `{ast.unparse(one.node)[:160]}` {does} {difference:,} cells whose {one.column} joins that "
            f"label with others, such as {joined[0]!r}. {aim} too, write: {wider}"
        )
    return said


def _parts(label: str) -> frozenset[str]:
    return frozenset(part.strip() for part in label.split(SEPARATOR))
