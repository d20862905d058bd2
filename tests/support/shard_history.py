"""Runs of shards in the words of any Dagster: run as a script, it fills the database of `DAGSTER_HOME`.

An older Dagster runs it, so it imports nothing else. Arguments: the name of the release partitions, and a release.
"""

import sys
import time
from typing import Any

import dagster as dg
from dagster._core.execution.backfill import BulkActionStatus, PartitionBackfill

BACKFILL = "before-the-upgrade"
NODE_LOST = "tests/node_lost"


def materialize(instance: dg.DagsterInstance, name: str, release: str, shard: str, **tags: Any) -> bool:
    """Run one shard, and tell whether it succeeded."""
    shards = {"release": dg.DynamicPartitionsDefinition(name=name), "shard": dg.StaticPartitionsDefinition(["0", "1"])}

    @dg.asset(key=["tiny", "shard_embeddings"], partitions_def=dg.MultiPartitionsDefinition(shards))
    def shard_embeddings(context: dg.AssetExecutionContext) -> None:
        if NODE_LOST in context.run.tags:
            raise RuntimeError("its node is lost")

    key = dg.MultiPartitionKey({"release": release, "shard": shard})
    done = dg.materialize([shard_embeddings], instance=instance, partition_key=key, tags={**tags}, raise_on_error=False)
    return done.success


def fill(instance: dg.DagsterInstance, name: str, release: str) -> None:
    """Add a release and a backfill of its two shards, of which one fails."""
    instance.add_dynamic_partitions(name, [release])
    backfill = PartitionBackfill(
        backfill_id=BACKFILL,
        status=BulkActionStatus.COMPLETED,
        from_failure=False,
        tags={"user": "someone"},
        backfill_timestamp=time.time(),
        partition_names=[],
    )
    instance.add_backfill(backfill)
    part = {"dagster/backfill": BACKFILL}
    assert materialize(instance, name, release, "0", **part)
    assert not materialize(instance, name, release, "1", **part, **{NODE_LOST: "yes"})


if __name__ == "__main__":
    with dg.DagsterInstance.get() as found:
        fill(found, *sys.argv[1:])
    print(dg.__version__)
