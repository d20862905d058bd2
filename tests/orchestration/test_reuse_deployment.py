"""A release that reuses cells, through a real daemon; and with its store on S3."""

import json
from pathlib import Path

import numpy as np
import pytest

from census_tf_dagster.pipeline.context import PlannedContext
from census_tf_dagster.pipeline.copy_shard import copy_shard
from census_tf_dagster.pipeline.finish_array import finish_array
from census_tf_dagster.pipeline.plan_release import make_plan
from tests.support.builders import value_of
from tests.support.deployment import running_locally
from tests.support.on_s3 import on_s3, reader_config
from tests.support.project import RELEASE, Project, read_array
from tests.support.releases import EARLIER, fill_planned, two_releases, verify_earlier

pytestmark = pytest.mark.takes(160)


def test_a_launch_plans_copies_computes_and_verifies_once(project: Project, tmp_path: Path) -> None:
    """Copies and shards are separate runs: a copy does not wait for a GPU, and a shard does not wait for a copy."""
    releases = two_releases(project, shards=2, megabatch_size=256)
    verify_earlier(releases)
    assert project.command("release", "add", RELEASE).returncode == 0
    told = project.command("launch", "reusing", RELEASE, "--dry-run")
    assert "reuse: reuses 160 cells (72.7%;" in told.stdout
    assert "would run 2 shards and compute 60 of their 220 cells" in told.stdout
    assert "and copy 160 in" in told.stdout
    with running_locally(project, daemon=True) as operator:
        done = operator.command("launch", "reusing", RELEASE)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "the plan, shards 0-1 with their copies, the array" in done.stdout
        assert "copies 2/2 done" in done.stdout
        runs, status = operator.runs(), operator.status("reusing")
    expected = {(f"reusing/{asset}", RELEASE): 1 for asset in ("obs_id_plan", "approval", "embeddings_array")}
    for asset in ("shard_embeddings", "reused_embeddings"):
        expected |= {(f"reusing/{asset}", f"{RELEASE}|{shard}"): 1 for shard in range(2)}
    assert runs == expected
    assert status["copies"] == {"done": "0-1", "running": "", "queued": "", "failed": "", "missing": ""}
    assert (status["cells_done"], status["cells_planned"], status["verified"]) == (220, 220, True)
    stored = read_array(project.array("reusing"), tmp_path)
    assert np.array_equal(stored.ids, np.arange(220))
    place = {int(row): joinid for joinid, row in enumerate(releases.earlier.rows)}
    unchanged = releases.unchanged()
    earlier = np.array([place[int(row)] for row in releases.later.rows[unchanged]])
    assert np.array_equal(stored.values[unchanged], value_of(earlier, 16))


def test_reuse_with_the_store_on_s3(project: Project, s3: str, tmp_path: Path) -> None:
    on_s3(project, s3)
    releases = two_releases(project)
    verify_earlier(releases)
    with project.context("reusing") as context:
        summary = make_plan(context)
        assert summary.cells_reused == 160
        assert summary.totals.source is not None
        assert summary.totals.source.root.startswith(f"s3://the-store/some/prefix/reusing/{EARLIER}/")
        fill_planned(context)
        with project.planned("reusing") as planned:
            assert type(planned) is PlannedContext
            assert sum(copy_shard(planned, shard).cells_copied for shard in range(4)) == 160
        finish_array(context)
        stored = read_array(context.folder.array, tmp_path, reader_config(s3))
    assert np.array_equal(stored.ids, np.arange(220))
    assert json.loads(stored.metadata["census_tf_record"])["cells"] == 220
