"""What a partition is: a Census release, and for shards a release and a shard. Nothing else belongs here."""

import warnings

import dagster as dg

RELEASES = dg.DynamicPartitionsDefinition(name="census_release")
"""Releases are added in the UI, by `release add` or by a sensor; all sets share them."""


COPIES = "shard_to_copy"
"""Dimension of the shards whose cells are copied. Dagster runs assets of equal partitions in one run, so with the
dimension of those that are computed, cells would be copied on a GPU node, and the GPU would wait for it."""


def shard_partitions(shards: int, dimension: str = "shard") -> dg.MultiPartitionsDefinition:
    """Return release x shard. A second dynamic dimension would break backfills, so shards are static."""
    width = len(str(shards - 1))
    return dg.MultiPartitionsDefinition(
        {
            "release": RELEASES,
            dimension: dg.StaticPartitionsDefinition([f"{i:0{width}d}" for i in range(shards)]),
        }
    )


with warnings.catch_warnings():
    # Beta in Dagster 1.13; pinned, and covered by tests both ways.
    warnings.simplefilter("ignore", dg.BetaWarning)
    BY_RELEASE = dg.MultiToSingleDimensionPartitionMapping(partition_dimension_name="release")
"""A shard depends on its release's plan; a release's array on all of its shards."""
