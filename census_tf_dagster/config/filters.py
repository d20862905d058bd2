"""Checks value filters before any data is read. tiledbsoma 2.3.0 evaluates every filter that `check_filter` accepts.

The grammar is that of `tiledbsoma/_query_condition.py`, without the parts that fail there: ``not (a == 1 or b == 2)``
is a segmentation fault, a comparison after `in` is ignored, and a sign in the middle of a chain is applied twice.
"""

import ast
import contextlib
import math
import warnings

from census_tf_dagster.io.names import CONTROL_CHARACTERS

EXAMPLE = "is_primary_data == True and tissue_general in ['blood', 'lung']"

LONGEST = 32_768
"""The longest filter, in characters. Measured: a list of 3,000 values (23,000 characters) takes 0.04 s to read."""
MOST_COMPARISONS = 250
"""The time grows with the square of their number: 200 take 0.6 s, 400 take 1.0 s, 800 take 3.3 s and reach Python's
recursion limit."""
DEEPEST = 100
"""How deep conditions may nest. Each ``|`` of ``a | b | c`` adds one level. tiledbsoma fails at about 480 levels."""
SHOWN = 80
"""How many characters of a filter an error shows."""

_ATTEMPTS = 5
_INTEGERS = (-(2**63), 2**64 - 1)
_COMPARISONS = (ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE)


def parse_filter(text: str) -> ast.Expression:
    """Return a filter as Python's syntax tree.

    Before Python 3.11.8, `ast.parse` fails when another thread, or a garbage collection in its middle, also parses:
    https://github.com/python/cpython/issues/106905. It is then called again.

    Raises
    ------
    SyntaxError, ValueError, RecursionError, MemoryError
        As `ast.parse` does.
    """
    for _ in range(_ATTEMPTS - 1):
        with contextlib.suppress(SystemError):
            return ast.parse(text, mode="eval")
    return ast.parse(text, mode="eval")


def check_filter(text: str) -> None:
    """Refuse a filter that tiledbsoma cannot evaluate on any columns.

    Planning checks later, with the Census, whether the columns exist and have the right types.

    Raises
    ------
    ValueError
        When the filter is invalid. The message quotes the invalid part.
    """
    if len(text) > LONGEST:
        raise _refusal(
            f"it has {len(text)} characters, and at most {LONGEST} are allowed; list values as `column in [...]`"
        )
    if "\x00" in text:
        raise _refusal("it has a NUL character")
    try:
        with warnings.catch_warnings():
            # Python only warns about some texts today, such as the escape sequence \d, and will refuse them later.
            # Other categories stay as they are: a garbage collection can emit a warning here.
            for category in (SyntaxWarning, DeprecationWarning):
                warnings.simplefilter("error", category)
            tree = parse_filter(text).body
    except (SyntaxError, ValueError) as error:
        raise _refusal(f"{getattr(error, 'msg', error)}"[:SHOWN]) from None
    except (RecursionError, MemoryError):
        raise _refusal(f"it nests deeper than {DEEPEST} conditions") from None
    comparisons = 0
    pending: list[tuple[ast.expr, int]] = [(tree, 1)]
    while pending:
        node, depth = pending.pop()
        if depth > DEEPEST:
            raise _refusal(f"it nests deeper than {DEEPEST} conditions; write `or` for | and `and` for &")
        match node:
            case ast.BoolOp():
                pending += [(one, depth + 1) for one in node.values]
            case ast.BinOp(op=ast.BitAnd() | ast.BitOr()):
                pending += [(node.left, depth + 1), (node.right, depth + 1)]
            case ast.Compare():
                comparisons += len(node.ops)
                _check_comparison(text, node)
            case ast.UnaryOp(op=ast.Not()):
                raise _refusal(f"{_part(text, node)} has `not`, which can crash the process; write != or `not in`")
            case _:
                raise _refusal(f"{_part(text, node)} is not a comparison")
        if comparisons > MOST_COMPARISONS:
            raise _refusal(f"it has more than {MOST_COMPARISONS} comparisons; list values as `column in [...]`")


def _check_comparison(text: str, node: ast.Compare) -> None:
    if isinstance(node.ops[0], ast.In | ast.NotIn):
        if len(node.ops) > 1:
            raise _refusal(f"{_part(text, node)} compares the result of `in`; use `and`")
        _check_membership(text, node.left, node.comparators[0])
        return
    operands = [node.left, *node.comparators]
    for left, op, right in zip(operands, node.ops, operands[1:], strict=False):
        if not isinstance(op, _COMPARISONS):
            raise _refusal(f"{_part(text, node)} has an operator other than ==, !=, <, <=, >, >= and `in`")
        if sum(_is_column(one) for one in (left, right)) != 1:
            raise _refusal(f"{_part(text, node)} should compare a column with a value; put texts in quotes")
        value = right if _is_column(left) else left
        in_the_middle = value is not operands[0] and value is not operands[-1]
        if _constant(value) is None and isinstance(op, ast.Eq | ast.NotEq):
            continue
        _check_value(text, value, signed=not in_the_middle)


def _check_membership(text: str, column: ast.expr, values: ast.expr) -> None:
    if not _is_column(column):
        raise _refusal(f"{_part(text, column)} is before `in` and is not a column")
    if not isinstance(values, ast.List) or not values.elts:
        raise _refusal(f"{_part(text, values)} is after `in` and is not a list such as ['blood', 'lung']")
    for value in values.elts:
        _check_value(text, value, signed=False)
    constants = [_constant(value) for value in values.elts]
    if any(isinstance(one, bool) for one in constants):
        raise _refusal(f"{_part(text, values)} has True or False; write column == True")
    if len({isinstance(one, str) for one in constants}) > 1:
        raise _refusal(f"{_part(text, values)} mixes texts and numbers; a column has only one of the two")


def _is_column(node: ast.expr) -> bool:
    """Tell whether a node is a column: a name, or ``attr("name")``."""
    argument = _argument(node, "attr")
    return isinstance(node, ast.Name) or (isinstance(argument, ast.Constant) and isinstance(argument.value, str))


def _argument(node: ast.expr, function: str) -> ast.expr | None:
    match node:
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name == function:
            return argument
    return None


def _constant(node: ast.expr) -> object:
    node = _argument(node, "val") or node
    return node.value if isinstance(node, ast.Constant) else ...


def _check_value(text: str, node: ast.expr, *, signed: bool) -> None:
    value: object
    if signed and isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        number = node.operand.value if isinstance(node.operand, ast.Constant) else None
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise _refusal(f"{_part(text, node)} is not a number")
        value = -number if isinstance(node.op, ast.USub) else number
    elif isinstance(node, ast.BinOp):
        raise _refusal(
            f"{_part(text, node)} is in the place of a value; put each comparison beside | or & in parentheses"
        )
    else:
        value = _constant(node)
    match value:
        case bool():
            return
        case str() if not CONTROL_CHARACTERS.search(value):
            return
        case int() if _INTEGERS[0] <= value <= _INTEGERS[1]:
            return
        case float() if math.isfinite(value):
            return
    raise _refusal(f"{_part(text, node)} is not a text in quotes, a number of 64 bits, True or False")


def _part(text: str, node: ast.expr) -> str:
    part = " ".join((ast.get_source_segment(text, node) or "").split())
    return repr(part if len(part) <= SHOWN else f"{part[:SHOWN]}...")


def _refusal(what: str) -> ValueError:
    return ValueError(f"invalid SOMA filter: {what}; expected, for example: {EXAMPLE}")
