"""The program that measures a deployment with the records of thousands of shards, in small."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.project import REPOSITORY

pytestmark = pytest.mark.soak


def test_every_figure_is_measured() -> None:
    """The program itself refuses a page that answers with an error, and records that `status` does not show as done."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.orchestration.fleet_records", "--quick", "--json"]
    done = subprocess.run(command, cwd=REPOSITORY, env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    (row,) = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert (row["storage"], row["shards"], row["releases"]) == ("sqlite", 8, 3)
    servers = {"code server", "webserver", "daemon"}
    assert row["peak_mib"].keys() == row["idle"].keys() == row["queue"]["cpu_s"].keys() == servers
    assert min(row["peak_mib"].values()) > 50
    assert row["queue"]["to_first_s"] > 0
    assert row["queue"]["cpu_s"]["daemon"] > 0
    assert row["stored_mib"] > 0
    assert {page["page"] for page in row["pages"]} >= {"runs", "backfill", "asset, partitions", "asset, checks"}
    assert all(min(one["s"]) > 0 for one in (*row["pages"], *row["commands"]))
    assert [one["command"] for one in row["commands"]][-1] == "launch --dry-run"
