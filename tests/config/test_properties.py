"""Seeded examples of user input: each works, or is refused quickly in one short line with nothing written.

200 examples in all in `make test`, 10,000 in `make soak`.
"""

import json
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pytest
import tiledbsoma
import yaml
from hypothesis import HealthCheck, Phase, given, settings

from census_tf_dagster.config.filters import check_filter
from census_tf_dagster.definitions import load_sets
from census_tf_dagster.demo.checkpoint import build_checkpoint
from census_tf_dagster.errors import UserError
from census_tf_dagster.inference.checkpoint import read_checkpoint
from census_tf_dagster.inference.packing import PackedCells, assemble
from census_tf_dagster.set_files import find_problems
from tests.support.project import load_engine

pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")

LONGEST_LINE = 600
CPU_SECONDS = 2.0
SHARES = {"sets": 0.25, "filters": 0.5, "checkpoints": 0.25}
QUICK, LONG = 200, 10_000

ODD_TEXTS = [
    "", " ", "~", "null", "yes", "on", "010", "1:30", "1e30", ".inf", ".nan", "-1", "0", "4.0", "2025-01-01", "=", "<<",
    "{{ env.HOME }}", "{{ env.NOT_SET }}", "{{", "{% x %}", "{{ 1 }}", "a\nb", "a\x00b", "\ud800", "\u202e", "ü☃",
    "x" * 200, "x" * 12_000, "../x", "/", "s3:/x", "gs://x", "team:", "a@b.c", "javascript:alert(1)", "type", "int",
    "https://ada:hunter2@host", "10.1/x",
]  # fmt: skip
ODD_VALUES: list[Any] = [
    *ODD_TEXTS, None, True, False, 0, 1, -1, 7, 2**31, 2**63, 10**30, 0.5, 4.0, -0.0, 1e300, float("inf"), float("nan"),
    [], [[]], ["x"], [1, "x"], {}, {"x": 1}, {1: 2}, {"budget": 5}, {"budget": -1}, [[[[[[1]]]]]],
]  # fmt: skip
WHOLE_SET: dict[str, Any] = {
    "type": "census_tf_dagster.embedding_set.EmbeddingSet",
    "attributes": {
        "name": "one",
        "organism": "homo_sapiens",
        "checkpoint": "/models/tf_sapiens",
        "checkpoint_fingerprint": "0" * 64,
        "pretrained_embeddings": ["s3://models/a.h5"],
        "shards": 4,
        "value_filter": "is_primary_data == True",
        "mod": 1,
        "megabatch_size": 64,
        "batch_size": 8,
        "compute_precision": "fp16",
        "storage_precision": "bfloat16",
        "gene_order": "vocabulary",
        "reuse": True,
        "device": "cuda",
        "auto_start": {"budget": 250},
        "owners": ["team:cells", "ada@example.org"],
        "publication": {
            "id": "CxG-contrib-1",
            "embedding_name": "tf",
            "title": "A title",
            "description": "A text",
            "primary_contact": {"name": "Ada", "email": "ada@example.org", "affiliation": "Engines"},
            "additional_contacts": [{"name": "Bo", "email": "bo@example.org", "affiliation": "Engines"}],
            "DOI": "10.1000/x",
            "model_link": "https://example.org/model",
            "submission_date": "2025-01-01",
        },
        "placement": {
            "gpus": 1,
            "cpu": 3.5,
            "memory_gib": 24,
            "disk_gib": 50,
            "purchase": "spot",
            "gpu_type": "L40S",
            "usd_per_gpu_hour": 1.9,
            "fleet_gpus": 8,
            "instance_types": ["g6e.xlarge", "g2-standard-8"],
            "ecs": {
                "task_definition": "worker",
                "capacity_providers": {"spot": "gpu-spot", "on_demand": "gpu"},
                "network": {"subnets": ["subnet-1"], "security_groups": ["sg-1"]},
                "disk": {"volume": "data", "role_arn": "arn:aws:iam::1:role/x"},
            },
            "kubernetes": {
                "image": "worker:1",
                "nodes": {"spot": {"node_selector": {"gpu": "l40s"}, "tolerations": [{"key": "gpu"}]}},
                "annotations": {"example.com/team": "cells"},
            },
        },
    },
}
SHARED = (
    "checkpoint", "checkpoint_fingerprint", "pretrained_embeddings", "batch_size", "compute_precision", "gene_order",
    "storage_precision", "device", "auto_start", "owners", "placement",
)  # fmt: skip
WHOLE_FILE_SET: dict[str, Any] = {
    "type": "census_tf_dagster.embedding_set.FileSet",
    "attributes": {
        "name": "lab",
        "files": "s3://lab/new",
        "layer": "counts",
        "gene_column": "ensembl_id",
        "duplicate_genes": "first",
        "assay_column": "assay",
        "like": "/store/one/2025-11-08/0123/embeddings",
        "fractional_counts": "set_aside",
        **{name: WHOLE_SET["attributes"][name] for name in SHARED},
    },
}
RIGHT_VALUES: dict[str, list[Any]] = {
    "name": ["type", "int", "A_9", "x" * 100],
    "checkpoint": ["models", "~/models", "s3://models/a b/tf", "file:///models", "{{ env.HOME }}/tf", "ü"],
    "pretrained_embeddings": [[], ["a.h5", "b.h5"]],
    "shards": [1, 9999],
    "value_filter": [None, "tissue in ['a', 'b'] or (nnz > 5) & (nnz < 9)", "label == '{{ env.HOME }}'"],
    "mod": [2, 10**9],
    "megabatch_size": [1, 131072],
    "batch_size": [None, 1],
    "compute_precision": ["fp32", "bf16"],
    "storage_precision": ["float32"],
    "gene_order": ["census"],
    "reuse": [False],
    "device": ["cpu"],
    "auto_start": ["off", "on", True, False, {"budget": 0.5}],
    "owners": [[], ["team:a-b"]],
    "publication": [None],
}
"""Replacements for the values above."""
COLUMNS: dict[str, list[str]] = {
    "tissue": ["'lung'", "'blood'", "'ü'", "''"],
    "label": ["'1'", '"2"', "'a b'"],
    "nnz": ["0", "7", "-1", "9223372036854775807"],
    "size": ["0.5", "-1.5", "3"],
    "is_primary_data": ["True", "False"],
}
ORDERED = ("label", "nnz", "size")
PIECES = [
    "not ", "and ", " or ", "&", "|", "(", ")", "[", "]", "'", '"', "attr(", "val(", "open('x')", "lambda: 1",
    "in ", "==", "<", "-", "~", "\n", "\x00", "\\", "\ud800", "{{ env.HOME }}", "1e999", "9" * 50, "nowhere", "None",
    "is None", ":=", " if ", "f'{x}'", "*", ",", "#",
]  # fmt: skip
GENES = [f"ENSG{i:011d}" for i in range(12)]
SHORT_CELL = np.array([1, 2, 3], np.int32)
TYPES_AND_COLUMNS = (
    "not found", "does not exist", "Cannot cast", "incompatible function arguments", "PyQueryCondition.", "inequality",
    "too large to convert", "out of bounds", "Cannot parse", "null", "KeyError", "Field", "overflow",
)  # fmt: skip
"""tiledbsoma's messages about columns that a dataframe does not have, or has with another type."""


@contextmanager
def within_bounds() -> Iterator[None]:
    start = time.process_time()
    yield
    assert time.process_time() - start < CPU_SECONDS


def is_one_short_line(text: str) -> None:
    assert "\n" not in text
    assert len(text) <= LONGEST_LINE, text


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value in mappings and lists, but not into the odd values, which all examples share."""
    if any(value is odd for odd in ODD_VALUES):
        return
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield (*at, key)
        yield from places(one, (*at, key))


def change(draw: st.DrawFn, document: Any, values: list[Any]) -> None:
    """Replace, remove, add or move one value of a document."""
    where = draw(st.sampled_from(sorted(places(document), key=str)))
    parent = document
    for part in where[:-1]:
        parent = parent[part]
    kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
    if kind == "replace":
        parent[where[-1]] = draw(st.sampled_from(values))
    elif kind == "remove":
        parent.pop(where[-1])
    elif isinstance(parent, dict):
        parent[draw(st.sampled_from(ODD_TEXTS))] = draw(st.sampled_from(values))
    else:
        parent.append(draw(st.sampled_from(values)))


def damage(draw: st.DrawFn, content: bytes, pieces: list[bytes]) -> bytes:
    """Cut, double, overwrite or insert something."""
    at = draw(st.integers(0, len(content)))
    length = draw(st.integers(0, 40))
    match draw(st.sampled_from(["cut", "double", "flip", "insert", "end"])):
        case "cut":
            return content[:at] + content[at + length :]
        case "double":
            return content[: at + length] + content[at:]
        case "flip":
            return content[:at] + draw(st.binary(min_size=1, max_size=4)) + content[at + 4 :]
        case "insert":
            return content[:at] + draw(st.sampled_from(pieces)) + content[at:]
    return content[:at]


@st.composite
def set_files(draw: st.DrawFn) -> dict[str, bytes]:
    document = json.loads(json.dumps(draw(st.sampled_from([WHOLE_SET, WHOLE_SET, WHOLE_FILE_SET]))))
    attributes = document["attributes"]
    for name in draw(st.lists(st.sampled_from(sorted(RIGHT_VALUES)), max_size=3)):
        if name in attributes:
            attributes[name] = json.loads(json.dumps(draw(st.sampled_from(RIGHT_VALUES[name]))))
    for _ in range(draw(st.integers(0, 2))):
        change(draw, document, ODD_VALUES)
    content = yaml.safe_dump(document, sort_keys=False, allow_unicode=draw(st.booleans())).encode(
        errors="surrogatepass"
    )
    pieces = [
        one.encode(errors="surrogatepass") for one in (*ODD_TEXTS, "&a ", "*a", "!!x ", "- ", ": ", "\t", "[" * 99)
    ]
    if draw(st.integers(0, 3)) == 0:
        content = damage(draw, content, pieces)
    files = {"one/defs.yaml": content}
    if draw(st.integers(0, 7)) == 0:
        placement = json.loads(json.dumps(WHOLE_SET["attributes"]["placement"]))
        change(draw, placement, ODD_VALUES)
        files["placement.yaml"] = yaml.safe_dump(placement).encode(errors="surrogatepass")
    return files


@st.composite
def filters(draw: st.DrawFn) -> str:
    def comparison() -> str:
        name = draw(st.sampled_from(sorted(COLUMNS)))
        column = draw(st.sampled_from([name, f"attr('{name}')"]))
        value = draw(st.sampled_from(COLUMNS[name]))
        if draw(st.booleans()) and name != "is_primary_data":
            listed = [one for one in COLUMNS[name] if not one.startswith("-")]
            return f"{column} {draw(st.sampled_from(['in', 'not in']))} [{', '.join(listed)}]"
        operators = ["==", "!=", "<", "<=", ">", ">="] if name in ORDERED else ["==", "!="]
        operator = draw(st.sampled_from(operators))
        return f"{column} {operator} {value}" if draw(st.booleans()) else f"{value} {operator} {column}"

    text = comparison()
    for _ in range(draw(st.integers(0, 6))):
        joint = draw(st.sampled_from(["{} and {}", "{} or {}", "({}) & ({})", "({}) | ({})", "({} or {})"]))
        text = joint.format(text, comparison())
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        pieces = [one.encode(errors="surrogatepass") for one in PIECES]
        text = damage(draw, text.encode(errors="surrogatepass"), pieces).decode(errors="replace")
    repeated = draw(st.sampled_from([1] * 8 + [40, 3000]))
    return draw(st.sampled_from([" or ", " | ", " and ", ""])).join([f"({text})"] * repeated) if repeated > 1 else text


@st.composite
def damaged_checkpoints(draw: st.DrawFn, good: dict[str, bytes]) -> dict[str, bytes]:
    files = dict(good)
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(["config.json"] * 6 + sorted(good)))
        document = None
        if name.endswith(".json") and draw(st.integers(0, 4)):
            try:
                document = json.loads(files[name])
            except ValueError:
                document = None
        if isinstance(document, dict) and document:
            change(draw, document, ODD_VALUES)
            files[name] = json.dumps(document).encode()
        else:
            files[name] = damage(draw, files[name], [b"{", b"null", b"\xff", b"0" * 99, b"[" * 5000])
    return files


def examples(kind: str, of: int) -> settings:
    return settings(
        max_examples=round(of * SHARES[kind]),
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )


def write_all(folder: Path, files: dict[str, bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def try_sets(folder: Path, of: int) -> Counter[str]:
    ends: Counter[str] = Counter()

    @examples("sets", of)
    @given(set_files())
    def each(files: dict[str, bytes]) -> None:
        write_all(folder, files)
        before = snapshot(folder)
        with within_bounds():
            problems = find_problems(folder)
        for one in problems:
            is_one_short_line(str(one))
            assert "hunter2" not in str(one)
        if not problems:
            assert load_sets(folder).assets
        assert snapshot(folder) == before
        ends["refused" if problems else "accepted"] += 1

    each()
    return ends


def complaint_of_tiledbsoma(uri: str, text: str) -> str | None:
    try:
        with tiledbsoma.DataFrame.open(uri) as frame:
            frame.read(value_filter=text, column_names=["soma_joinid"]).concat()
    except tiledbsoma.SOMAError as error:
        return str(error)
    return None


def try_filters(uri: str, of: int) -> Counter[str]:
    ends: Counter[str] = Counter()

    @examples("filters", of)
    @given(filters())
    def each(text: str) -> None:
        try:
            with within_bounds():
                check_filter(text)
        except ValueError as error:
            is_one_short_line(str(error))
            ends["refused"] += 1
            return
        said = complaint_of_tiledbsoma(uri, text)
        assert said is None or any(words in said for words in TYPES_AND_COLUMNS), said
        ends["of another column or type" if said else "accepted"] += 1

    each()
    return ends


def try_checkpoints(folder: Path, good: dict[str, bytes], of: int) -> Counter[str]:
    ends: Counter[str] = Counter()

    @examples("checkpoints", of)
    @given(damaged_checkpoints(good))
    def each(files: dict[str, bytes]) -> None:
        write_all(folder, files)
        before = snapshot(folder)
        found, end = None, "refused"
        try:
            with within_bounds():
                found = read_checkpoint(folder)
            end = "refused when prepared"
            engine = load_engine(found, [gene for gene in GENES if found.knows(gene)])
        except UserError as error:
            is_one_short_line(str(error))
        else:
            # A damaged vocabulary may know few of the genes. Planning refuses that later.
            tokens = np.minimum(SHORT_CELL, len(engine.model.table[0]) - 1)
            cell = PackedCells(tokens, np.ones(3, np.float32), np.array([0, 3]))
            embedded = engine.model.embed(assemble(cell, np.array([0])))
            assert embedded.shape == (1, found.shape.embed_dim)
            end = "accepted"
        assert snapshot(folder) == before
        ends[end] += 1

    each()
    return ends


@pytest.fixture(scope="module")
def dataframe(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("filters") / "obs")
    table = pa.table(
        {
            "soma_joinid": pa.array(range(9), pa.int64()),
            "tissue": pa.array(["lung", "blood", "eye"] * 3).dictionary_encode(),
            "label": pa.array([str(i) for i in range(9)], pa.large_string()),
            "nnz": pa.array(range(9), pa.int64()),
            "size": pa.array([i / 2 for i in range(9)], pa.float32()),
            "is_primary_data": pa.array([i % 2 == 0 for i in range(9)]),
        }
    )
    tiledbsoma.DataFrame.create(uri, schema=table.schema, domain=[(0, 8)]).close()
    with tiledbsoma.DataFrame.open(uri, "w") as frame:
        frame.write(table)
    return uri


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("checkpoint") / "good"
    sizes = {"embed_dim": 8, "num_heads": 2, "num_layers": 1, "model_dim": 8, "esm_dim": 4, "seq_len": 15}
    build_checkpoint(folder, GENES, ["10x"], block_len=16, gene_head_dim=4, **sizes)
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def both_ends(ends: Counter[str], kind: str, of: int) -> None:
    print(f"{kind}: {dict(sorted(ends.items()))} of {sum(ends.values())} examples")
    assert min(ends["accepted"], ends["refused"]) >= 0.1 * of * SHARES[kind]


def test_set_files(tmp_path: Path) -> None:
    both_ends(try_sets(tmp_path / "sets", QUICK), "sets", QUICK)


def test_filters(dataframe: str) -> None:
    both_ends(try_filters(dataframe, QUICK), "filters", QUICK)


def test_checkpoints(tmp_path: Path, checkpoint: dict[str, bytes]) -> None:
    both_ends(try_checkpoints(tmp_path / "checkpoint", checkpoint, QUICK), "checkpoints", QUICK)


@pytest.mark.soak
def test_many_set_files(tmp_path: Path) -> None:
    both_ends(try_sets(tmp_path / "sets", LONG), "sets", LONG)


@pytest.mark.soak
def test_many_filters(dataframe: str) -> None:
    both_ends(try_filters(dataframe, LONG), "filters", LONG)


@pytest.mark.soak
def test_many_checkpoints(tmp_path: Path, checkpoint: dict[str, bytes]) -> None:
    both_ends(try_checkpoints(tmp_path / "checkpoint", checkpoint, LONG), "checkpoints", LONG)
