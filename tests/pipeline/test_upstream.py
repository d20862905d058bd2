"""Upstream's command is recognised, and waiting for it is limited."""

import sys
from pathlib import Path

import numpy as np
import pytest

from census_tf_dagster.census.cells import read_cells
from census_tf_dagster.errors import UserError
from census_tf_dagster.pipeline.upstream import require_upstream, upstream_running
from tests.support.builders import tiny
from tests.support.project import RELEASE, Project, UpstreamCommand


def program(folder: Path, python: str | None, name: str = "transcriptformer") -> Path:
    """Make a program beside a shell script with the name python."""
    folder.mkdir()
    for file, text in ((name, "exit 0"), ("python", python)):
        if text is not None:
            (folder / file).write_text(f"#!/bin/sh\n{text}\n")
            (folder / file).chmod(0o755)
    return folder / name


HANGS = "exec sleep 1000"
KNOWS_ITS_VERSION = 'case "$2" in *metadata*) echo transcriptformer 0.6.1;; *) exec sleep 1000;; esac'


@pytest.mark.parametrize(
    ("python", "name", "message"),
    [
        (HANGS, "transcriptformer", "did not report within 1 s which version of transcriptformer it has"),
        ("yes | head -100000", "transcriptformer", "is another program .the Python beside it says 'y'"),
        ("echo no such package >&2; exit 1", "transcriptformer", "says 'no such package'"),
        (None, "transcriptformer", "no Python beside it can be run"),
        (KNOWS_ITS_VERSION, "pip", "pip is another program"),
    ],
)
def test_another_program_is_refused_at_once(tmp_path: Path, python: str | None, name: str, message: str) -> None:
    command = program(tmp_path / "bin", python, name)
    with pytest.raises(UserError, match=message) as told:
        require_upstream(command, seconds=1)
    assert "expected upstream's `transcriptformer` command" in str(told.value)
    assert len(str(told.value)) < 600
    assert "\n" not in str(told.value)


def test_a_canary_refuses_another_program_before_it_reads_anything(project: Project) -> None:
    tiny(project)
    done = project.command("canary", "tiny", RELEASE, "--upstream", str(Path(sys.executable).with_name("pytest")))
    assert done.returncode == 1
    assert done.stderr.startswith("error: --upstream ")
    assert "pytest is another program" in done.stderr
    assert "reading obs" not in done.stderr


def test_upstream_is_waited_for_no_longer_than_said(project: Project, tmp_path: Path) -> None:
    tiny(project)
    command = program(tmp_path / "bin", KNOWS_ITS_VERSION)
    with project.context("tiny") as context:
        cells = read_cells(context.release, np.arange(3), context.checkpoint.aux_column)
        with (
            pytest.raises(UserError, match="took more than 0 s for 3 cells and was ended"),
            upstream_running(context, cells, command) as answer,
        ):
            answer(0.2)


@pytest.mark.upstream
def test_upstreams_own_command_is_known(upstream_command: UpstreamCommand) -> None:
    require_upstream(upstream_command.command)
