"""The asset `reused_embeddings` of sets with `reuse`, with one partition per release and shard. It runs on the CPU."""

import time
from typing import TYPE_CHECKING

import dagster as dg

from census_tf_dagster.config.dagster_names import PLAN, REUSED
from census_tf_dagster.config.settings import SetSettings
from census_tf_dagster.orchestration.asset_support import (
    asset_key,
    asset_of,
    planned_partition_context,
    shard_of,
    stop_if_run_is_over,
)
from census_tf_dagster.orchestration.assets.shard_embeddings import OBSERVE_EVERY_SECONDS
from census_tf_dagster.orchestration.automation import once_for_new_partitions
from census_tf_dagster.orchestration.checks.rules import report_if_stale
from census_tf_dagster.orchestration.metadata import titled
from census_tf_dagster.orchestration.partitions import BY_RELEASE, COPIES, shard_partitions
from census_tf_dagster.orchestration.resources import CensusResource, StoreResource

if TYPE_CHECKING:
    from census_tf_dagster.pipeline.copy_shard import CopySummary


class CopyConfig(dg.Config):
    """The run configuration of `reused_embeddings`."""

    recompute: bool = False
    """Copy all reused cells again, even if they are already in the array."""


def build_reused_embeddings(settings: SetSettings) -> dg.AssetsDefinition:
    """Build the asset that copies the unchanged cells of a set. It has no placement, because it needs no GPU."""
    key = asset_key(settings, REUSED)

    @dg.asset(
        **asset_of(settings, REUSED),
        partitions_def=shard_partitions(settings.shards, COPIES),
        deps=[dg.AssetDep(asset_key(settings, PLAN), partition_mapping=BY_RELEASE)],
        kinds={"tiledb"},
        automation_condition=once_for_new_partitions(settings.spending),
        description=(
            f"The embeddings of those cells of one shard of {settings.organism} that are already in an earlier "
            "release's array, copied as planned. If you run it again, it copies only what is missing."
        ),
    )
    def reused_embeddings(
        context: dg.AssetExecutionContext, config: CopyConfig, census: CensusResource, store: StoreResource
    ) -> dg.MaterializeResult[None]:
        from census_tf_dagster.pipeline.copy_shard import copy_shard

        keys, release, shard = shard_of(context, COPIES)
        observed = time.monotonic()

        def show(progress: "CopySummary") -> None:
            nonlocal observed
            stop_if_run_is_over(context)
            if progress.megabatches_copied == 1:
                report_if_stale(context, settings, release, opened)
            done, rate = progress.cells_before + progress.cells_copied, progress.cells_per_second()
            context.log.info(f"copied {done:,} of {progress.cells:,} cells, {rate:.0f} cells/s")
            if time.monotonic() - observed >= OBSERVE_EVERY_SECONDS:
                observed = time.monotonic()
                metadata = titled({"cells_done": done, "cells": progress.cells, "cells_per_second": rate})
                context.log_event(dg.AssetObservation(asset_key=key, partition=keys, metadata=metadata))

        with planned_partition_context(settings, release, census, store) as opened:
            summary = copy_shard(opened, shard, recompute=config.recompute, report=show)
            if summary.megabatches_copied:
                # Check again: the array may have been verified between the first commit and the last.
                report_if_stale(context, settings, release, opened)
        return dg.MaterializeResult(
            metadata=titled(
                {
                    "cells": summary.cells,
                    "cells_copied": summary.cells_copied,
                    "megabatches": summary.megabatches,
                    "megabatches_copied": summary.megabatches_copied,
                    "cells_per_second": round(summary.cells_per_second(), 2),
                    "source": summary.source.root if summary.source and summary.cells else "nothing to copy",
                    "plan": summary.plan,
                    "seconds_work": round(summary.seconds, 3),
                    "seconds_verification": round(summary.verification_seconds, 3),
                    "verified": summary.verified,
                }
            )
        )

    return reused_embeddings
