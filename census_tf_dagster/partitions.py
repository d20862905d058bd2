"""What a partition is: a Census release, and for shards a release and a shard. Nothing else belongs here."""

import warnings

import dagster as dg

RELEASES = dg.DynamicPartitionsDefinition(name="census_release")
"""Releases are added in the UI, by `release add` or by a sensor; all sets share them."""


def shard_partitions(shards: int) -> dg.MultiPartitionsDefinition:
    """Return release x shard. A second dynamic dimension would break backfills, so shards are static."""
    width = len(str(shards - 1))
    return dg.MultiPartitionsDefinition(
        {
            "release": RELEASES,
            "shard": dg.StaticPartitionsDefinition([f"{i:0{width}d}" for i in range(shards)]),
        }
    )


with warnings.catch_warnings():
    # Beta in Dagster 1.13; pinned, and covered by tests both ways.
    warnings.simplefilter("ignore", dg.BetaWarning)
    BY_RELEASE = dg.MultiToSingleDimensionPartitionMapping(partition_dimension_name="release")
"""A shard depends on its release's plan; a release's array on all of its shards."""
