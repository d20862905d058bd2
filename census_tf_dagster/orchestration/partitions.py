"""The partitions: a Census release, and for shards a release and a shard. Nothing else belongs here."""

import warnings

import dagster as dg

RELEASES = dg.DynamicPartitionsDefinition(name="census_release")
"""All sets share the releases. The web interface, `release add` and a sensor add them."""

COPIES = "shard_to_copy"
"""The dimension of shards in `reused_embeddings`. It differs from that of `shard_embeddings`: Dagster runs assets with
equal partitions in one run, so cells would be copied on a GPU node while the GPU waits."""


def shard_partitions(shards: int, dimension: str = "shard") -> dg.MultiPartitionsDefinition:
    """Return release x shard. Shards are static, because a second dynamic dimension would break backfills.

    A shard's key is its number without leading zeros, so that it stays the same when a set gets more shards.
    """
    keys = dg.StaticPartitionsDefinition([str(shard) for shard in range(shards)])
    return dg.MultiPartitionsDefinition({"release": RELEASES, dimension: keys})


with warnings.catch_warnings():
    # This mapping is beta in Dagster 1.13. Its version is pinned, and tests cover both directions.
    warnings.simplefilter("ignore", dg.BetaWarning)
    BY_RELEASE = dg.MultiToSingleDimensionPartitionMapping(partition_dimension_name="release")
"""A shard depends on the plan of its release. The array of a release depends on all of its shards."""
