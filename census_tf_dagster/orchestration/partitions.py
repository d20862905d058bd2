"""The partitions: a Census release, for shards a release and a shard, and for a set of files a file."""

import warnings

import dagster as dg

from census_tf_dagster.config.settings import CommonSettings, FileSetSettings

RELEASES = dg.DynamicPartitionsDefinition(name="census_release")
"""All sets share the releases. The web interface, `release add` and a sensor add them."""

COPIES = "shard_to_copy"
"""The dimension of shards in `reused_embeddings`. It differs from that of `shard_embeddings`: Dagster runs assets with
equal partitions in one run, so cells would be copied on a GPU node while the GPU waits."""


def file_partitions(settings: FileSetSettings) -> dg.DynamicPartitionsDefinition:
    """Return the files of a set of files. Its sensor adds them; a key is the name of a file."""
    return dg.DynamicPartitionsDefinition(name=f"{settings.name}_files")


def whole_partitions(settings: CommonSettings) -> dg.DynamicPartitionsDefinition:
    """Return the partitions of a set's plan, approval and array: its releases, or its files."""
    return file_partitions(settings) if isinstance(settings, FileSetSettings) else RELEASES


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
