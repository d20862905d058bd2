"""The asset `embeddings_index`, with one partition per release: the index of the array, for searches."""

import dagster as dg

from census_tf_dagster.config.dagster_names import ARRAY, INDEX
from census_tf_dagster.config.settings import SetSettings
from census_tf_dagster.orchestration.asset_support import asset_key, asset_of, console_link, partition_context
from census_tf_dagster.orchestration.automation import once_for_new_partitions
from census_tf_dagster.orchestration.metadata import titled
from census_tf_dagster.orchestration.partitions import RELEASES
from census_tf_dagster.orchestration.resources import CensusResource, StoreResource


def build_embeddings_index(settings: SetSettings) -> dg.AssetsDefinition:
    """Build the index asset of a set."""

    @dg.asset(
        **asset_of(settings, INDEX),
        partitions_def=RELEASES,
        deps=[asset_key(settings, ARRAY)],
        kinds={"tiledb"},
        automation_condition=once_for_new_partitions(settings.spending),
        description=(
            "An index of the array, to search it for nearest cells: all cells with counts and an embedding, centred "
            "and projected onto principal components. A build that was interrupted goes on where it was."
        ),
    )
    def embeddings_index(
        context: dg.AssetExecutionContext, census: CensusResource, store: StoreResource
    ) -> dg.MaterializeResult[None]:
        from census_tf_dagster.pipeline.index_array import build_index

        with partition_context(settings, context.partition_key, census, store) as opened:
            summary = build_index(opened, context.log.info)
        index = summary.description
        return dg.MaterializeResult(
            metadata=titled(
                {
                    "cells": index.cells,
                    "recall": round(summary.recall, 4),
                    "dimensions": index.dimensions,
                    "variance_kept": round(index.variance_kept, 4),
                    "partitions": index.partitions,
                    "partitions_read_per_search": index.probes,
                    "bytes_per_cell": round(summary.bytes / index.cells, 1),
                    "identity": index.identity,
                    "index": dg.MetadataValue.path(summary.uri),
                    **console_link(summary.uri, store),
                }
            )
        )

    return embeddings_index
