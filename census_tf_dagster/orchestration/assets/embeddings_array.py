"""The asset `embeddings_array`: one partition per release, materialized only when verified."""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from census_tf_dagster.config.dagster_names import ARRAY
from census_tf_dagster.config.settings import SetSettings
from census_tf_dagster.orchestration.asset_support import (
    asset_key,
    asset_of,
    console_link,
    final_failure,
    partition_context,
)
from census_tf_dagster.orchestration.automation import once_for_new_partitions
from census_tf_dagster.orchestration.checks.rules import evaluations
from census_tf_dagster.orchestration.partitions import BY_RELEASE, RELEASES
from census_tf_dagster.orchestration.resources import CensusResource, StoreResource


class ArrayConfig(dg.Config):
    """Run configuration of the final asset."""

    full: bool = False
    """Read every value again, not only what was committed after the shards read theirs back."""


def build_embeddings_array(settings: SetSettings) -> dg.AssetsDefinition:
    """Build a set's final asset."""

    @dg.asset(
        **asset_of(settings, ARRAY),
        partitions_def=RELEASES,
        deps=[
            dg.AssetDep(asset_key(settings, name), partition_mapping=BY_RELEASE)
            for name in ("shard_embeddings", *(["reused_embeddings"] if settings.reuse else []))
        ],
        kinds={"tiledb"},
        automation_condition=once_for_new_partitions(settings.spending),
        description=(
            f"The TileDB-SOMA array with the embedding of every planned cell of {settings.organism}, verified: exactly "
            "the planned cells less those that were set aside, each with all its values, all finite."
        ),
    )
    def embeddings_array(
        context: dg.AssetExecutionContext, config: ArrayConfig, census: CensusResource, store: StoreResource
    ) -> dg.MaterializeResult[None]:
        from census_tf_dagster.pipeline.finish_array import RuleError, finish_array

        def show(done: int, of: int) -> None:
            context.log.info(f"read {done} of {of} shards again")

        with partition_context(settings, context.partition_key, census, store) as opened:
            try:
                summary = finish_array(opened, full=config.full, report=show)
            except RuleError as error:
                for evaluation in evaluations(settings, context.partition_key, error.findings):
                    if evaluation.check_name not in ("publication", "obs_ids"):
                        context.log_event(evaluation)
                raise final_failure(str(error)) from error
        return dg.MaterializeResult(
            metadata={
                "cells": summary.cells,
                "cells_planned": summary.totals.cells,
                "cells_set_aside": len(summary.set_aside),
                "set_aside": [f"{cells} cells: {why}" for why, cells in summary.reasons()],
                "rows": summary.shape[0],
                "features": summary.shape[1],
                "fragments": summary.fragments,
                "excess_fragments": summary.excess_fragments,
                "shards_read_again": len(summary.read_again),
                "plan": summary.totals.plan,
                "identity": summary.identity,
                "published": published_as(summary.published),
                "array": dg.MetadataValue.path(summary.uri),
                **console_link(summary.uri, store),
            },
        )

    return embeddings_array


def published_as(info: "Mapping[str, Any] | None") -> str:
    """Say in a line what the array says of itself; the whole stands in meta.yml beside it."""
    if not info:
        return "no: the set's YAML has no `publication`"
    return f"{info['embedding_name']}: {info['title']} ({info['id']})"
