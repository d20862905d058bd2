"""The asset `shard_embeddings`: one partition per release and shard, one run each."""

import dagster as dg

from census_tf_dagster.assets.common import asset_key, partition_job
from census_tf_dagster.partitions import BY_RELEASE, shard_partitions
from census_tf_dagster.resources import CensusResource, StoreResource
from census_tf_dagster.settings import SetSettings


class ShardConfig(dg.Config):
    """Run configuration of a shard."""

    recompute: bool = False
    """Compute and write all cells again, though they are in the array already."""


def build_shard_embeddings(settings: SetSettings) -> dg.AssetsDefinition:
    """Build a set's GPU asset."""

    @dg.asset(
        key=asset_key(settings, "shard_embeddings"),
        group_name=settings.name,
        partitions_def=shard_partitions(settings.shards),
        deps=[dg.AssetDep(asset_key(settings, "obs_id_plan"), partition_mapping=BY_RELEASE)],
        kinds={"torch", "tiledb"},
        description=(
            f"Embeddings of one shard of {settings.organism}: counts from the Census, tokens, model, committed to the "
            "array megabatch by megabatch. Run again, it does only what is missing."
        ),
    )
    def shard_embeddings(
        context: dg.AssetExecutionContext, config: ShardConfig, census: CensusResource, store: StoreResource
    ) -> dg.MaterializeResult[None]:
        from census_tf_dagster.steps.embedding import ShardSummary, embed_shard

        keys = context.partition_key
        if not isinstance(keys, dg.MultiPartitionKey):
            raise TypeError(f"partition key {keys!r} has no release and shard")
        release, shard = keys.keys_by_dimension["release"], int(keys.keys_by_dimension["shard"])

        def log(progress: ShardSummary) -> None:
            context.log.info(
                f"megabatch {progress.megabatches_computed} committed: {progress.cells_computed:,} of "
                f"{progress.cells:,} cells in this run"
            )

        with partition_job(settings, release, census, store) as job:
            summary = embed_shard(job, shard, recompute=config.recompute, report=log)
        model_seconds = summary.seconds.get("model", 0.0)
        return dg.MaterializeResult(
            metadata={
                "cells": summary.cells,
                "cells_computed": summary.cells_computed,
                "megabatches": summary.megabatches,
                "megabatches_computed": summary.megabatches_computed,
                "tokens_computed": summary.tokens_computed,
                "cells_per_second": round(summary.cells_computed / model_seconds, 2) if model_seconds else 0.0,
                "plan": summary.plan,
                **{f"seconds_{stage}": round(seconds, 3) for stage, seconds in summary.seconds.items()},
            },
        )

    return shard_embeddings
