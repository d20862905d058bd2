"""Value filters: tiledbsoma evaluates every filter that `check_filter` accepts, and returns the right rows."""

import ast
import gc
import time
import warnings

import pyarrow as pa
import pytest
import tiledbsoma

from census_tf_dagster.config.filters import DEEPEST, LONGEST, MOST_COMPARISONS, check_filter

ROWS = 60


def obs_table() -> pa.Table:
    return pa.table(
        {
            "soma_joinid": pa.array(range(ROWS), pa.int64()),
            "tissue": pa.array([("lung", "blood", "eye")[i % 3] for i in range(ROWS)]).dictionary_encode(),
            "label": pa.array([str(i) for i in range(ROWS)], pa.large_string()),
            "odd.name": pa.array([i % 2 for i in range(ROWS)], pa.int32()),
            "nnz": pa.array([i - 10 for i in range(ROWS)], pa.int64()),
            "size": pa.array([i / 2 for i in range(ROWS)], pa.float32()),
            "is_primary_data": pa.array([i % 4 == 0 for i in range(ROWS)]),
        }
    )


@pytest.fixture(scope="module")
def obs(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("filters") / "obs")
    table = obs_table()
    tiledbsoma.DataFrame.create(uri, schema=table.schema, domain=[(0, ROWS - 1)]).close()
    with tiledbsoma.DataFrame.open(uri, "w") as frame:
        frame.write(table)
    return uri


def matching(obs: str, text: str) -> list[int]:
    with tiledbsoma.DataFrame.open(obs) as frame:
        found = frame.read(value_filter=text, column_names=["soma_joinid"]).concat()
    return sorted(found["soma_joinid"].to_pylist())


RIGHT = {
    "is_primary_data == True and tissue in ['blood', 'lung']": lambda i: i % 4 == 0 and i % 3 != 2,
    "True == is_primary_data": lambda i: i % 4 == 0,
    "tissue not in ['blood']": lambda i: i % 3 != 1,
    "tissue != 'eye' or label == '2'": lambda i: i % 3 != 2 or i == 2,
    "(nnz == 1) | (nnz == 2) & (size > 0)": lambda i: i in (11, 12),
    "nnz < -8": lambda i: i < 2,
    "-3 <= nnz < +3": lambda i: 7 <= i < 13,
    "0 < nnz < 5 < soma_joinid": lambda i: 10 < i < 15,
    "nnz in [1, 2, 99]": lambda i: i in (11, 12),
    "size >= 29.0": lambda i: i >= 58,
    "size in [val(1), 1.5]": lambda i: i in (2, 3),
    "attr('odd.name') == val(1)": lambda i: i % 2 == 1,
    'attr("label") in ["3", "4"]': lambda i: i in (3, 4),
    "label == 'über ☃'": lambda i: False,
    "label != None": lambda i: True,
    "(\n  nnz == 0\n  or nnz == 1\n)\n": lambda i: i in (10, 11),
    " | ".join(["(nnz == 1)"] * (DEEPEST - 1)): lambda i: i == 11,
    " or ".join(f"nnz == {i}" for i in range(MOST_COMPARISONS)): lambda i: i >= 10,
    "(nnz == 1 or (size >= 0 and " * 40 + "nnz == 2" + "))" * 40: lambda i: i in (11, 12),
    f"label in {[str(i) for i in range(3000)]}": lambda i: True,
}


@pytest.mark.parametrize("text", RIGHT, ids=lambda text: text[:40])
def test_an_accepted_filter_gives_the_right_rows(obs: str, text: str) -> None:
    check_filter(text)
    assert matching(obs, text) == [i for i in range(ROWS) if RIGHT[text](i)]


WRONG = {
    "": "invalid syntax",
    "tissue": "'tissue' is not a comparison",
    "tissue = 'lung'": "invalid syntax",
    "tissue == lung": "compare a column with a value; put texts in quotes",
    "1 == 2": "compare a column with a value",
    "nnz == 1 | nnz == 2": "put each comparison beside | or & in parentheses",
    "nnz is 1": "an operator other than",
    "nnz == -val(3)": "is not a number",
    "nnz == (1, 2)": "'(1, 2)' is not a text in quotes",
    "nnz in (1, 2)": "'(1, 2)' is after `in` and is not a list",
    "nnz in []": "is not a list such as",
    "nnz in [1, 'a']": "mixes texts and numbers",
    "nnz in [-1]": "'-1' is not a text in quotes",
    "is_primary_data in [True]": "write column == True",
    "nnz in [1] == True": "compares the result of `in`",
    "0 < nnz in [1]": "an operator other than",
    "'a' in tissue": "is before `in` and is not a column",
    "size > -1 < nnz": "'-1' is not a text in quotes",
    "not nnz == 1": "has `not`, which can crash the process",
    "not (nnz == 1 or nnz == 2)": "has `not`, which can crash the process",
    "open('/etc/passwd') == 1": "compare a column with a value",
    "open('/etc/passwd')": "is not a comparison",
    "__import__('os').system('true') == 1": "compare a column with a value",
    "nnz == __import__('os')": "is not a text in quotes",
    "nnz == (lambda: 1)()": "is not a text in quotes",
    "(lambda: nnz == 1)()": "is not a comparison",
    "[nnz for nnz in [1]] == 1": "compare a column with a value",
    "nnz == [x for x in [1]]": "is not a text in quotes",
    "label == f'{nnz}'": "is not a text in quotes",
    "label == b'1'": "is not a text in quotes",
    "nnz == 1j": "is not a text in quotes",
    "nnz == ...": "is not a text in quotes",
    "nnz < None": "is not a text in quotes",
    "nnz == -'a'": "is not a number",
    "nnz == -True": "is not a number",
    "nnz == ~1": "is not a text in quotes",
    "nnz == 1 + 1": "'1 + 1' is in the place of a value",
    "orig.ident == 1": "compare a column with a value",
    "attr(nnz) == 1": "compare a column with a value",
    "attr('nnz', 2) == 1": "compare a column with a value",
    "attr('nnz', x=2) == 1": "compare a column with a value",
    "nnz == val(val(1))": "is not a text in quotes",
    "nnz == 99999999999999999999": "a number of 64 bits",
    "nnz == 1e999": "a number of 64 bits",
    f"nnz == {'9' * 5000}": "Exceeds the limit",
    "label == 'a\\x00'": "is not a text in quotes",
    "label == '\\d'": "invalid escape sequence",
    "nnz == 1\x00": "NUL",
    "(y := 1) == nnz": "is not a text in quotes",
    "nnz == 1 if True else nnz": "is not a comparison",
    " | ".join(["(a == 1)"] * 2500): "nests deeper than",
    " or ".join(["a == 1"] * 251): "more than 250 comparisons",
    "1 < a" + " < 2 < a" * 200: "more than 250 comparisons",
    "(" * 5000 + "nnz == 1" + ")" * 5000: "too many nested parentheses",
    "not " * 5000 + "nnz == 1": "",
    "-" * 20000 + "1 == nnz": "",
    "a" * (LONGEST + 1): "it has 32769 characters",
    " and ".join(["nnz == 1"] * 20000): "characters",
    "nnz in [" + "[" * 10000: "",
}


@pytest.mark.parametrize("text", WRONG, ids=lambda t: t[:40])
def test_an_invalid_filter_is_refused_in_one_short_line(text: str) -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match=r"^invalid SOMA filter: ") as caught:
        check_filter(text)
    told = str(caught.value)
    assert WRONG[text] in told
    assert "\n" not in told
    assert len(told) < 320
    assert time.process_time() - start < 2


class Garbage:
    """What only a garbage collection finds. Its removal warns, and parses a text."""

    def __init__(self, removed: list[int]) -> None:
        self.own, self.removed = self, removed

    def __del__(self) -> None:
        warnings.warn("left open", ResourceWarning, stacklevel=1)
        # The formatting of a traceback does the same, for each of its lines.
        self.removed.append(len(ast.dump(ast.parse("a.b"))))


@pytest.mark.filterwarnings("ignore:left open:ResourceWarning")
def test_a_filter_can_be_parsed_while_garbage_is_collected() -> None:
    removed: list[int] = []
    before = gc.get_threshold()
    thresholds = range(200, 8_000, 400)
    try:
        for threshold in thresholds:
            gc.collect()
            gc.disable()
            Garbage(removed)
            gc.set_threshold(threshold)
            gc.enable()
            with pytest.raises(ValueError, match="nests deeper than"):
                check_filter(" | ".join(["(a == 1)"] * 2500))
    finally:
        gc.set_threshold(*before)
        gc.enable()
    assert len(removed) == len(thresholds)
