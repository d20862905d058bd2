"""The PostgreSQL of a deployment with an older Dagster is migrated, and its releases continue (docs/upgrade.md)."""

import os
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
import yaml

from census_tf_dagster.orchestration.partitions import RELEASES
from tests.support.environments import environment
from tests.support.postgres import postgres
from tests.support.project import RELEASE, REPOSITORY
from tests.support.shard_history import BACKFILL, materialize

pytestmark = pytest.mark.soak

NAME = str(RELEASES.name)
OLDER = ["dagster==1.8.0", "dagster-postgres==0.24.0", "six", "setuptools<81"]
OLDER += ["pydantic<2.9", "sqlalchemy<2.1", "alembic<1.14"]
"""A Dagster of August 2024 with libraries of its time. Tables and indexes were added since, and data is moved."""


def revisions_differ() -> bool:
    """Tell whether the schema of the database is another one than the installed Dagster's."""
    with dg.DagsterInstance.get() as instance:
        found, expected = instance._run_storage.alembic_version()  # type: ignore[misc]
    return bool(found != expected)


def test_a_database_of_an_older_dagster(
    pytestconfig: pytest.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pytestconfig.cache is not None
    older = environment(pytestconfig.cache, "dagster-1.8", OLDER)
    storage = yaml.safe_load((REPOSITORY / "deploy" / "ecs" / "dagster.yaml").read_text())["storage"]
    (tmp_path / "dagster.yaml").write_text(yaml.safe_dump({"storage": storage, "telemetry": {"enabled": False}}))
    with postgres() as database:
        env = {"PATH": os.environ["PATH"], "DAGSTER_HOME": str(tmp_path), **database}
        history = [str(older), str(REPOSITORY / "tests" / "support" / "shard_history.py"), NAME, RELEASE]
        assert subprocess.check_output(history, env=env, text=True) == "1.8.0\n"
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        assert revisions_differ()
        # The second time changes nothing.
        for _ in range(2):
            subprocess.check_output([Path(sys.executable).with_name("dagster"), "instance", "migrate"], env=env)
            assert not revisions_differ()

        key = dg.AssetKey(["tiny", "shard_embeddings"])
        with dg.DagsterInstance.get() as instance:
            assert instance.get_dynamic_partitions(NAME) == [RELEASE]
            assert instance.get_materialized_partitions(key) == {f"{RELEASE}|0"}
            runs = instance.get_runs(dg.RunsFilter.for_backfill(BACKFILL))
            ends = {run.tags["dagster/partition"]: run.status.value for run in runs}
            assert ends == {f"{RELEASE}|0": "SUCCESS", f"{RELEASE}|1": "FAILURE"}
            backfill = instance.get_backfill(BACKFILL)
            assert backfill is not None
            assert backfill.tags == {"user": "someone"}
            # The newer Dagster does what the older one did not.
            assert materialize(instance, NAME, RELEASE, "1")
            assert instance.get_materialized_partitions(key) == {f"{RELEASE}|0", f"{RELEASE}|1"}
