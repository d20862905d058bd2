"""The asset `obs_id_plan` of a set of files, with one partition per file. It checks the file before a GPU is paid."""

import dagster as dg

from census_tf_dagster.config.dagster_names import PLAN
from census_tf_dagster.config.settings import FileSetSettings
from census_tf_dagster.orchestration.approval_gate import cost_metadata, last_shards
from census_tf_dagster.orchestration.asset_support import asset_of, console_link, file_partition_context
from census_tf_dagster.orchestration.metadata import titled
from census_tf_dagster.orchestration.partitions import file_partitions
from census_tf_dagster.orchestration.resources import StoreResource


def build_file_plan(settings: FileSetSettings) -> dg.AssetsDefinition:
    """Build the plan asset of a set of files."""

    @dg.asset(
        **asset_of(settings, PLAN),
        partitions_def=file_partitions(settings),
        kinds={"anndata", "parquet"},
        description=(
            "The plan of a file: its cells in the order of the file, and in which write each is committed. It checks "
            "counts and gene ids, estimates the cost and creates the empty array."
        ),
    )
    def obs_id_plan(context: dg.AssetExecutionContext, store: StoreResource) -> dg.MaterializeResult[None]:
        from census_tf_dagster.own_cells.file_context import plan_file
        from census_tf_dagster.pipeline.cost_estimate import estimate, tokens_left

        with file_partition_context(settings, context.partition_key, store) as opened:
            plan = plan_file(opened)
            cost = estimate(opened, tokens_left(opened, plan), last_shards(context.instance, settings))
            progress = opened.own.progress
        totals = plan.totals
        context.log.info(progress.about)
        for note in progress.notes:
            context.log.warning(note)
        context.log.info(str(cost))
        return dg.MaterializeResult(
            data_version=dg.DataVersion(totals.plan),
            metadata=titled(
                {
                    "cells": totals.cells,
                    "tokens": totals.tokens,
                    **cost_metadata(cost, settings),
                    "megabatches": totals.megabatches,
                    "genes": len(opened.gene_ids),
                    "genes_known": len(opened.known_genes),
                    "gene_column": opened.identity.gene_column,
                    "gene_order": opened.identity.gene_order,
                    "matrix": opened.identity.matrix,
                    "assay": opened.identity.assay,
                    "warnings": "\n\n".join(progress.notes) or "none",
                    "plan": totals.plan,
                    "identity": opened.identity.digest,
                    "file": dg.MetadataValue.path(opened.own.source.name),
                    "folder": dg.MetadataValue.path(opened.folder.root),
                    **console_link(opened.folder.root, store),
                }
            ),
        )

    return obs_id_plan
