"""The commands as an operator types them, against a real Dagster instance."""

import subprocess
import sys
from pathlib import Path

import pytest

from census_tf_dagster import set_files
from census_tf_dagster.cli import main
from census_tf_dagster.errors import UserError
from census_tf_dagster.pipeline.embed_shard import embed_shard
from census_tf_dagster.pipeline.plan_release import make_plan
from tests.support.builders import tiny
from tests.support.project import RELEASE, Project

pytestmark = pytest.mark.takes(30)


def test_release_add_and_list(project: Project) -> None:
    tiny(project)
    unknown = project.command("release", "add", "1999-01-01")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    assert unknown.stderr.startswith("error: release '1999-01-01' is unknown: there is no Census at")
    first = project.command("release", "add", RELEASE)
    assert (first.returncode, first.stderr) == (0, "")
    assert f"release {RELEASE} added" in first.stdout
    assert "was there already" in project.command("release", "add", RELEASE).stdout
    assert project.command("release", "list").stdout.split() == [RELEASE]


@pytest.mark.parametrize("name", ["../2025-11-08", "a|b", ".hidden", ""])
def test_release_names_that_would_leave_the_store(project: Project, name: str) -> None:
    done = project.command("release", "add", name)
    assert done.returncode == 1
    assert "expected letters, digits" in done.stderr


def test_release_add_without_dagster_home(project: Project) -> None:
    tiny(project)
    del project.env["DAGSTER_HOME"]
    done = project.command("release", "add", RELEASE)
    assert done.returncode == 1
    assert "DAGSTER_HOME is not set" in done.stderr
    project.env["DAGSTER_HOME"] = "dagster_home"
    done = project.command("release", "add", RELEASE)
    assert done.returncode == 1
    assert done.stderr.startswith("error: DAGSTER_HOME is 'dagster_home'; expected the absolute path")


def test_unknown_partitions_say_so(project: Project) -> None:
    tiny(project)
    unknown = project.materialize("tiny/obs_id_plan", "1999-01-01")
    assert unknown.returncode != 0
    assert "1999-01-01" in unknown.stderr + unknown.stdout
    assert project.command("release", "add", RELEASE).returncode == 0
    beyond = project.materialize("tiny/shard_embeddings", f"{RELEASE}|4")
    assert beyond.returncode != 0
    assert not (project.folder / "store").exists()


def test_a_shard_before_its_plan_says_what_to_do(project: Project) -> None:
    tiny(project)
    assert project.command("release", "add", RELEASE).returncode == 0
    done = project.materialize("tiny/shard_embeddings", f"{RELEASE}|0")
    assert done.returncode != 0
    assert "materialize obs_id_plan of this release first" in done.stderr
    assert not (project.folder / "store").exists()


def test_recompute_is_run_configuration(project: Project) -> None:
    tiny(project, shards=1)
    assert project.command("release", "add", RELEASE).returncode == 0
    with project.context("tiny") as context:
        make_plan(context)
        embed_shard(context, 0)
    fragments = project.array("tiny") / "__fragments"
    before = len(list(fragments.iterdir()))
    again = project.materialize("tiny/shard_embeddings", f"{RELEASE}|0")
    assert again.returncode == 0, again.stderr
    assert len(list(fragments.iterdir())) == before
    config = '{"ops": {"tiny__shard_embeddings": {"config": {"recompute": true}}}}'
    recomputed = project.materialize("tiny/shard_embeddings", f"{RELEASE}|0", config)
    assert recomputed.returncode == 0, recomputed.stderr
    assert len(list(fragments.iterdir())) == 2 * before


def test_an_organism_that_the_census_lacks(project: Project) -> None:
    tiny(project)
    (project.folder / "sets" / "tiny" / "defs.yaml").unlink()
    (project.folder / "sets" / "tiny").rmdir()
    project.add_set("tiny", organism="danio_rerio")
    message = r"organism 'danio_rerio' is not in the Census at .*; expected one of: homo_sapiens"
    with pytest.raises(UserError, match=message), project.context("tiny"):
        pass


def test_a_lack_of_memory_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(set_files, "find_problems", full)
    assert main(["check", "."]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: this process got no more memory")
    assert told.count("\n") == 1


@pytest.mark.parametrize("arguments", [f"verify tiny {RELEASE}", f"launch tiny {RELEASE} --dry-run"])
@pytest.mark.parametrize("megabytes", [250, 450, 600, 650])
def test_libraries_that_do_not_fit_into_the_limit_of_memory_are_one_line(
    tmp_path: Path, megabytes: int, arguments: str
) -> None:
    command = f"ulimit -v {megabytes * 1024}; exec {sys.executable} -m census_tf_dagster {arguments}"
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: this process got no more memory ("), done.stderr
    assert done.stderr.count("\n") == 1
