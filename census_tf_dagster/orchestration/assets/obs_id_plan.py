"""The asset `obs_id_plan`, with one partition per release. `pipeline.plan_release` makes the plan."""

import dagster as dg

from census_tf_dagster.config.cost import utc_now
from census_tf_dagster.config.dagster_names import PLAN
from census_tf_dagster.config.settings import SetSettings
from census_tf_dagster.io.names import is_local
from census_tf_dagster.orchestration.approval_gate import cost_metadata, last_shards
from census_tf_dagster.orchestration.asset_support import asset_of, console_link, partition_context
from census_tf_dagster.orchestration.automation import once_for_new_partitions
from census_tf_dagster.orchestration.checks.rules import report_if_stale
from census_tf_dagster.orchestration.metadata import titled
from census_tf_dagster.orchestration.partitions import RELEASES
from census_tf_dagster.orchestration.resources import CensusResource, StoreResource


def build_obs_id_plan(settings: SetSettings) -> dg.AssetsDefinition:
    """Build the plan asset of a set."""

    @dg.asset(
        **asset_of(settings, PLAN),
        partitions_def=RELEASES,
        kinds={"tiledb", "parquet"},
        automation_condition=once_for_new_partitions(settings.spending),
        description=(
            f"The plan: which cells of {settings.organism} are embedded, in which shard and in which write. It lists "
            "the matching obs ids, writes the immutable plan and the list of planned ids, and creates the empty array."
        ),
    )
    def obs_id_plan(
        context: dg.AssetExecutionContext, census: CensusResource, store: StoreResource
    ) -> dg.MaterializeResult[None]:
        from census_tf_dagster.census.plan import read_plan
        from census_tf_dagster.pipeline.cost_estimate import estimate, tokens_left
        from census_tf_dagster.pipeline.plan_release import make_plan

        with partition_context(settings, context.partition_key, census, store) as opened:
            summary = make_plan(opened)
            tokens = tokens_left(opened, read_plan(opened.store, opened.folder.plan))
            cost = estimate(opened, tokens, last_shards(context.instance, settings))
            report_if_stale(context, settings, context.partition_key, opened)
        totals = summary.totals
        context.log.info(
            f"planned {totals.cells:,} cells ({totals.tokens:,} tokens) in {totals.shards} shards and "
            f"{totals.megabatches} megabatches; the checkpoint knows {summary.known_genes:,} of "
            f"{summary.expressed_genes:,} expressed genes"
        )
        context.log.info(str(cost))
        context.log.info(f"gene ids: {summary.gene_check}")
        for warning in summary.warnings:
            context.log.warning(warning)
        if settings.reuse:
            context.log.info(summary.reuse())
            for reason in summary.passed_over:
                context.log.info(f"not reused: {reason}")
        ours, theirs = summary.storage_versions
        if ours != theirs:
            context.log.warning(
                f"the array has TileDB storage version {ours}; the Census has {theirs}, and its curators require that. "
                "Before any shard runs, create the array with theirs (docs/publish.md)."
            )
        here, there = store.s3_region, "" if is_local(opened.release.uri) else opened.release.storage.s3.region
        if here and there and here != there:
            context.log.warning(
                f"the Census is in {there}, the store in {here}. AWS charges for data that crosses regions."
            )
        listed = census.listed(context.partition_key)
        for warning in listed.objections(cost.finish(utc_now())) if listed else []:
            context.log.warning(warning)
        return dg.MaterializeResult(
            data_version=dg.DataVersion(totals.plan),
            metadata=titled(
                {
                    "cells": totals.cells,
                    "primary_cells": totals.primary_cells,
                    "duplicate_cells": totals.cells - totals.primary_cells,
                    "cells_without_counts": "unknown" if (zeros := totals.cells_without_counts) is None else zeros,
                    "tokens": totals.tokens,
                    "cells_to_compute": totals.cells_to_compute,
                    "tokens_to_compute": totals.tokens_to_compute,
                    "cells_reused": totals.cells_reused,
                    "tokens_reused": totals.tokens_reused,
                    "reused_from": totals.source.root if totals.source else "nothing",
                    **cost_metadata(cost, settings),
                    "release_deleted_from": str((listed and listed.deleted_from) or "stays"),
                    "shards": totals.shards,
                    "megabatches": totals.megabatches,
                    "bytes_to_write": summary.estimated_bytes,
                    "expressed_genes": summary.expressed_genes,
                    "expressed_genes_known": summary.known_genes,
                    "expressed_entries_known_share": summary.known_share,
                    "storage_version": ours,
                    "storage_version_census": theirs,
                    "gene_ids": summary.gene_check,
                    "warnings": "\n\n".join(summary.warnings) or "none",
                    "plan": totals.plan,
                    "identity": summary.identity,
                    "folder": dg.MetadataValue.path(summary.root),
                    "census": dg.MetadataValue.path(opened.release.uri),
                    **console_link(summary.root, store),
                }
            ),
        )

    return obs_id_plan
