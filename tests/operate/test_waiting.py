"""`status` says that shards wait for a node, and since when."""

from datetime import datetime

from census_tf_dagster.operate.remote_set import RemoteSet
from census_tf_dagster.operate.status import ReleaseStatus, ShardStates, describe

SINCE = datetime(2026, 1, 2, 3, 4).astimezone()


def status(waiting: tuple[int, ...]) -> ReleaseStatus:
    return ReleaseStatus(
        release="2025-11-08",
        plan="done",
        approval="done",
        approved=None,
        shards=ShardStates(done=(0,), running=(1, 2, 3), queued=(), failed=(), missing=()),
        copies=None,
        array="missing",
        array_path=None,
        verified=None,
        cells_planned=40,
        cells_done=10,
        cells_set_aside=0,
        cells_per_second=0.0,
        limited_by={},
        waiting_for_node=waiting,
        waiting_since=SINCE.timestamp() if waiting else None,
        backfill=None,
        seconds_left=None,
        failures={},
        stuck=(),
        needed_for_repair=None,
    )


def test_shards_that_wait_for_a_node() -> None:
    of = RemoteSet("tiny", "location", ("2025-11-08",), ("0", "1", "2", "3"), reuses=False)
    assert "  nodes   2 of the running shards wait for a node since 2026-01-02 03:04" in describe(of, status((1, 3)))
    assert "  nodes " not in describe(of, status(()))
    found = status((1, 3)).as_json()
    assert (found["waiting_for_node"], found["waiting_since"]) == ("1,3", SINCE.timestamp())
