"""The asset `embeddings_array`, with one partition per release. It materializes only when the array is verified."""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from census_tf_dagster.config.dagster_names import ARRAY, REUSED, SHARDS
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
from census_tf_dagster.orchestration.metadata import titled
from census_tf_dagster.orchestration.partitions import BY_RELEASE, RELEASES
from census_tf_dagster.orchestration.resources import CensusResource, StoreResource


class ArrayConfig(dg.Config):
    """The run configuration of the array."""

    full: bool = False
    """Read every value again, not only values that were committed after the shards read theirs back."""


def build_embeddings_array(settings: SetSettings) -> dg.AssetsDefinition:
    """Build the array asset of a set."""

    @dg.asset(
        **asset_of(settings, ARRAY),
        partitions_def=RELEASES,
        deps=[
            dg.AssetDep(asset_key(settings, name), partition_mapping=BY_RELEASE)
            for name in (SHARDS, *([REUSED] if settings.reuse else []))
        ],
        kinds={"tiledb"},
        automation_condition=once_for_new_partitions(settings.spending),
        description=(
            f"The verified TileDB-SOMA array of the embeddings of {settings.organism}: exactly the planned cells, "
            "except those that were set aside, each with all its values, all finite."
        ),
    )
    def embeddings_array(
        context: dg.AssetExecutionContext, config: ArrayConfig, census: CensusResource, store: StoreResource
    ) -> dg.MaterializeResult[None]:
        from census_tf_dagster.pipeline.finish_array import RuleError, finish_array

        def show(done: int, total: int) -> None:
            context.log.info(f"read {done} of {total} shards again")

        with partition_context(settings, context.partition_key, census, store) as opened:
            try:
                summary = finish_array(opened, full=config.full, report=show)
            except RuleError as error:
                for evaluation in evaluations(settings, context.partition_key, error.findings):
                    if evaluation.check_name not in ("publication", "obs_ids"):
                        context.log_event(evaluation)
                raise final_failure(str(error)) from error
        return dg.MaterializeResult(
            metadata=titled(
                {
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
                }
            ),
        )

    return embeddings_array


def published_as(info: "Mapping[str, Any] | None") -> str:
    """Return one line about the array's publication. meta.yml beside the array has all of it."""
    if not info:
        return "no: the set's YAML has no `publication`"
    return f"{info['embedding_name']}: {info['title']} ({info['id']})"
