"""The command embeds files, goes on where it was killed, and damages nothing."""

import fcntl
import json
import os
import re
import resource
import shutil
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import anndata
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import tiledbsoma.io

from census_tf_dagster import embed
from census_tf_dagster.cli import main
from census_tf_dagster.io.s3 import OBJECT_PATIENCE
from census_tf_dagster.own_cells.local_copy import local_copy
from census_tf_dagster.own_cells.model import Access
from census_tf_dagster.own_cells.source import CellSource
from tests.support.moto_servers import REGION, upload
from tests.support.own_files import ASSAYS, checkpoint, some_cells
from tests.support.project import REPOSITORY
from tests.support.warm_processes import WarmProcess

__all__ = ["checkpoint"]


@pytest.fixture
def cells(tmp_path: Path) -> Path:
    some_cells().write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["embed", *map(str, arguments)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_all_formats_hold_the_same(checkpoint: Path, cells: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("h5ad", "parquet", "npy"):
        code, out, _ = run(capsys, cells, "--checkpoint", checkpoint, "--format", name, "--json")
        assert code == 0
        (said,) = json.loads(out)["outputs"]
        assert said["output"] == str(cells.with_name(f"cells.transcriptformer.{name}"))
    expected = np.load(cells.with_name("cells.transcriptformer.npy"))
    with pytest.warns(UserWarning, match="have an assay that the checkpoint does not know"):
        assert np.array_equal(expected, embed(cells, checkpoint))
    adata = anndata.read_h5ad(cells.with_name("cells.transcriptformer.h5ad"))
    assert np.array_equal(adata.obsm["X_transcriptformer"], expected)
    pd.testing.assert_frame_equal(adata.obs, anndata.read_h5ad(cells).obs)
    table = pq.read_table(cells.with_name("cells.transcriptformer.parquet"))
    assert table["cell"].to_pylist() == adata.obs_names.tolist()
    assert np.array_equal(np.stack(table["embedding"].to_numpy()), expected)
    descriptions = [
        json.loads(adata.uns["transcriptformer"]),
        json.loads(pq.read_schema(cells.with_name("cells.transcriptformer.parquet")).metadata[b"transcriptformer"]),
        json.loads(cells.with_name("cells.transcriptformer.json").read_text()),
    ]
    assert descriptions[0] == descriptions[1] == descriptions[2]
    assert descriptions[0]["identity"]["gene_column"] == "ensembl_id"
    assert not list(cells.parent.glob("*.partial"))


def test_a_killed_command_goes_on(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "many.h5ad"
    adata = some_cells(8000)
    adata.obs["assay"] = ASSAYS[0]
    adata.write_h5ad(file)
    arguments = [str(file), "--checkpoint", str(checkpoint)]
    assert run(capsys, *arguments, "--out", tmp_path / "whole.npy")[0] == 0
    output = tmp_path / "killed.npy"
    journal = tmp_path / "killed.npy.partial" / "journal.jsonl"
    kills, before = 0, 0
    for lines in (3, 8, 14):
        command = ["embed", *arguments, "--out", str(output)]
        with WarmProcess("census_tf_dagster", command, REPOSITORY, os.environ) as worker:
            while worker.poll() is None and (not journal.exists() or journal.read_text().count("\n") < lines):
                time.sleep(0.001)
            worker.kill()
            kills += worker.wait() == -9
    assert kills == 3
    # What a process leaves that dies while it writes: a line that was cut, and values that were not written.
    text = journal.read_text()
    journal.write_text(text[: text.rindex('"checksum"')])
    values = output.with_name("killed.npy.partial") / "values.npy"
    with values.open("r+b") as broken:
        broken.seek(values.stat().st_size - 8000 * 16 * 4)
        broken.write(bytes(64))
    code, out, _ = run(capsys, *arguments, "--out", output, "--json")
    assert code == 0
    (said,) = json.loads(out)["outputs"]
    before = said["before"]
    assert said["before"] >= 400 * 8
    assert said["before"] + said["embedded"] == 8000
    assert np.array_equal(np.load(output), np.load(tmp_path / "whole.npy"))
    assert before


def test_a_file_that_changes_while_it_is_read(
    checkpoint: Path, cells: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = CellSource.require_unchanged

    def touched(source: CellSource) -> None:
        os.utime(cells)
        written(source)

    monkeypatch.setattr(CellSource, "require_unchanged", touched)
    code, _, said = run(capsys, cells, "--checkpoint", checkpoint)
    assert code == 1
    assert "cells.h5ad changed while it was read" in said
    assert not cells.with_name("cells.transcriptformer.h5ad").exists()


def test_a_finished_file_is_not_embedded_again(
    checkpoint: Path, cells: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [cells, "--checkpoint", checkpoint]
    assert run(capsys, *arguments)[0] == 0
    output = cells.with_name("cells.transcriptformer.h5ad")
    written = output.stat().st_mtime_ns
    code, out, _ = run(capsys, *arguments, "--json")
    assert code == 0
    assert json.loads(out)["outputs"][0]["embedded"] == 0
    code, _, said = run(capsys, *arguments, "--gene-order", "vocabulary")
    assert code == 1
    assert "or of a file that has changed since (gene_order, gene_fingerprint)" in said
    # Cells of the same names have other counts.
    some_cells(seed=1).write_h5ad(cells)
    code, _, said = run(capsys, *arguments)
    assert code == 1
    assert "(cells)" in said
    assert output.stat().st_mtime_ns == written


def test_an_unfinished_result_of_other_cells_is_kept(
    checkpoint: Path, cells: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    partial = cells.with_name("cells.transcriptformer.h5ad.partial")
    partial.mkdir()
    (partial / "journal.jsonl").write_text('{"identity": {"checkpoint_fingerprint": "another"}}\n')
    code, _, said = run(capsys, cells, "--checkpoint", checkpoint)
    assert code == 1
    assert "is the unfinished result of other cells or other settings (checkpoint_fingerprint" in said
    assert (partial / "journal.jsonl").exists()


def test_a_disk_without_space_is_named(checkpoint: Path, cells: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After it, the command goes on."""
    assert run(capsys, cells, "--checkpoint", checkpoint, "--out", cells.with_name("first.npy"))[0] == 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    output = cells.with_name("second.parquet")
    # The values fit, and the finished file does not.
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))
    try:
        code, _, said = run(capsys, cells, "--checkpoint", checkpoint, "--out", output)
        assert code == 1
        assert f"{output} cannot be written" in said
        code, _, said = run(capsys, cells, "--checkpoint", checkpoint, "--out", output.with_name("no") / "b.npy")
        assert code == 0, said
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, before[1]))
        code, _, said = run(capsys, cells, "--checkpoint", checkpoint, "--out", cells.with_name("third.npy"))
        assert code == 1
        assert f"{cells.with_name('third.npy.partial')} cannot be written" in said
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not output.exists()
    code, out, _ = run(capsys, cells, "--checkpoint", checkpoint, "--out", output, "--json")
    assert code == 0
    assert json.loads(out)["outputs"][0]["embedded"] == 0
    embeddings = np.stack(pq.read_table(output)["embedding"].to_numpy())
    assert np.array_equal(embeddings, np.load(cells.with_name("first.npy")))


def test_space_is_looked_for_first(
    checkpoint: Path, cells: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(cells)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * 60 * 16 * 4 - 1))
    code, _, said = run(capsys, cells, "--checkpoint", checkpoint, "--out", cells.parent / "new" / "out.h5ad")
    assert code == 1
    assert f"{cells.parent} has 0.0 GiB free; expected 0.0 GiB for 60 cells" in said
    assert run(capsys, cells, "--checkpoint", checkpoint, "--out", cells.parent / "new" / "out.npy")[0] == 0


def test_two_commands_for_one_output(checkpoint: Path, cells: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = cells.with_name("out.npy")
    output.with_name("out.npy.partial").mkdir()
    with (output.with_name("out.npy.partial") / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, said = run(capsys, cells, "--checkpoint", checkpoint, "--out", output)
    assert code == 1
    assert f"another process writes {output}" in said


def test_a_dry_run_computes_nothing(checkpoint: Path, cells: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, said = run(capsys, cells, "--checkpoint", checkpoint, "--dry-run")
    assert code == 0
    assert "60 cells; the checkpoint knows 73 of 80 genes (ensembl_id)" in said
    assert f"{cells} -> {cells.with_name('cells.transcriptformer.h5ad')} (fp32 on cpu); nothing was computed" in said
    assert sorted(path.name for path in cells.parent.iterdir()) == ["cells.h5ad", "checkpoint"]


def test_every_file_is_checked_before_the_first_is_embedded(
    checkpoint: Path, cells: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, said = run(capsys, cells, cells.with_name("missing.h5ad"), "--checkpoint", checkpoint)
    assert (code, list(cells.parent.glob("*.transcriptformer.*"))) == (1, [])
    assert "missing.h5ad does not exist" in said


def test_files_on_s3(
    checkpoint: Path,
    tmp_path: Path,
    s3: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adata = some_cells()
    lab = tmp_path / "lab"
    lab.mkdir()
    tiledbsoma.io.from_anndata(str(lab / "soma"), adata, measurement_name="RNA", X_layer_name="raw")
    adata.write_h5ad(lab / "cells.h5ad")
    with warnings.catch_warnings():
        # anndata will change its default format; both are read.
        warnings.simplefilter("ignore", UserWarning)
        adata.write_zarr(lab / "cells.zarr")
    upload(lab, s3, "labs", "lab")
    monkeypatch.setenv("CENSUS_TF_STORE_S3_ENDPOINT", s3)
    monkeypatch.setenv("CENSUS_TF_STORE_S3_REGION", REGION)
    with pytest.warns(UserWarning, match="have an assay"):
        expected = embed(adata, checkpoint)
    for name in ("soma", "cells.h5ad", "cells.zarr"):
        output = tmp_path / f"{name}.npy"
        code, _, said = run(capsys, f"s3://labs/lab/{name}", "--checkpoint", checkpoint, "--out", output)
        assert code == 0, said
        assert np.array_equal(np.load(output), expected)
        # Nothing that was copied stays.
        assert not [path for path in (tmp_path / "cache").glob("files/*") if path.is_dir()]
    code, _, said = run(capsys, "s3://labs/nothing", "--checkpoint", checkpoint, "--out", output)
    assert code == 1
    assert "s3://labs/nothing cannot be opened as a SOMA experiment" in said


def test_a_store_that_is_not_reached_is_an_error_in_one_line(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CENSUS_TF_STORE_S3_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    # With the default, it takes a minute.
    monkeypatch.setitem(OBJECT_PATIENCE, "retries", {"total_max_attempts": 1})
    command = ["s3://labs/cells.h5ad", "--checkpoint", checkpoint, "--out", tmp_path]
    code, _, said = run(capsys, *command)
    assert code == 1
    assert said.startswith("error: s3://labs/cells.h5ad cannot be reached: Could not connect to the endpoint URL")


def test_copies_of_a_file_on_s3(
    checkpoint: Path, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = tmp_path / "lab"
    lab.mkdir()
    some_cells().write_h5ad(lab / "cells.h5ad")
    upload(lab, s3, "copies", "lab")
    monkeypatch.setenv("CENSUS_TF_STORE_S3_ENDPOINT", s3)
    monkeypatch.setenv("CENSUS_TF_STORE_S3_REGION", REGION)
    access = Access.of_environment()
    uri = "s3://copies/lab/cells.h5ad"
    with local_copy(uri, access.storage, access.cache) as first:
        written = Path(first).stat().st_mtime_ns
        with local_copy(uri, access.storage, access.cache) as second:
            assert second == first
        # Whoever ends first removes nothing that another one reads.
        assert Path(first).stat().st_mtime_ns == written
    assert not Path(first).exists()
    # A process that was killed leaves a part.
    Path(first).parent.mkdir()
    Path(first).write_bytes(b"a part")
    with local_copy(uri, access.storage, access.cache) as again:
        assert Path(again).read_bytes() == (lab / "cells.h5ad").read_bytes()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    command = [uri, "--checkpoint", checkpoint, "--out", tmp_path / "out.npy"]
    # A look at a file needs no copy.
    code, _, said = run(capsys, *command, "--dry-run")
    assert code == 0
    assert "60 cells; the checkpoint knows 73 of 80 genes" in said
    code, _, said = run(capsys, *command)
    assert code == 1
    assert re.search(r"copies/lab/cells.h5ad has 0.0 GiB, and .*/cache/files has 0.0 GiB free; expected space", said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a.h5ad", "b.h5ad", "--out", "one.h5ad"], "--out one.h5ad is one file, and 2 files are given"),
        (["a.h5ad", "--out", "one.h5ad", "--format", "npy"], "--out one.h5ad does not end in --format npy"),
        (["x/a.h5ad", "y/a.h5ad", "--out", "z"], "two files would be written to z/a.transcriptformer.h5ad"),
        (["a.h5ad", "a.h5ad"], "a file is given twice"),
        (["s3://bucket/a"], "s3://bucket/a is not on this machine, so its output needs a place"),
        (["a.h5ad", "--batch-size", "0"], "--batch-size is 0; expected at least 1"),
    ],
)
def test_outputs_that_are_not_clear(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, errors = run(capsys, *arguments, "--checkpoint", "nowhere")
    assert code == 1
    assert said in errors
