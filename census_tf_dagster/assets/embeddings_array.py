"""The asset `embeddings_array`: one partition per release, materialized only when proved."""

import dagster as dg

from census_tf_dagster.assets.common import asset_key, partition_job
from census_tf_dagster.partitions import BY_RELEASE, RELEASES
from census_tf_dagster.resources import CensusResource, StoreResource
from census_tf_dagster.settings import SetSettings


def build_embeddings_array(settings: SetSettings) -> dg.AssetsDefinition:
    """Build a set's final asset."""

    @dg.asset(
        key=asset_key(settings, "embeddings_array"),
        group_name=settings.name,
        partitions_def=RELEASES,
        deps=[dg.AssetDep(asset_key(settings, "shard_embeddings"), partition_mapping=BY_RELEASE)],
        kinds={"tiledb"},
        description=(
            f"The TileDB-SOMA array with the embedding of every planned cell of {settings.organism}, proved: exactly "
            "the planned cells, each with all its values, all finite."
        ),
    )
    def embeddings_array(
        context: dg.AssetExecutionContext, census: CensusResource, store: StoreResource
    ) -> dg.MaterializeResult[None]:
        from census_tf_dagster.steps.finishing import finish_array

        with partition_job(settings, context.partition_key, census, store) as job:
            summary = finish_array(job)
        return dg.MaterializeResult(
            metadata={
                "cells": summary.totals.cells,
                "rows": summary.shape[0],
                "features": summary.shape[1],
                "fragments": summary.fragments,
                "excess_fragments": summary.excess_fragments,
                "shards_read_again": len(summary.read_again),
                "plan": summary.totals.plan,
                "identity": summary.identity,
                "array": dg.MetadataValue.path(summary.uri),
            },
        )

    return embeddings_array
