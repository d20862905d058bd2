"""The check `proved` of `embeddings_array`: whether the last proof still covers plan and commits.

Dagster leaves out its own staleness edge at 100 and more upstream partitions, so this check says it: it runs
after each materialization and on demand, and whatever makes the proof stale reports it as failed: a shard that
commits, another plan.
"""

import warnings

import dagster as dg

from census_tf_dagster.assets.common import asset_key, partition_job
from census_tf_dagster.partitions import RELEASES
from census_tf_dagster.resources import CensusResource, StoreResource
from census_tf_dagster.settings import SetSettings

CHECK = "proved"
MEANING = {
    "proved": "The array is exactly the plan, and nothing was committed since that was proved.",
    "stale": "Plan or commits have changed since the array was proved: materialize embeddings_array again.",
    "unproved": "The array was never proved: materialize embeddings_array.",
}


def build_proved_check(settings: SetSettings) -> dg.AssetChecksDefinition:
    """Build the blocking check of a set's final asset."""
    with warnings.catch_warnings():
        # Partitioned checks are marked as preview in Dagster 1.13; pinned, and covered by tests.
        warnings.simplefilter("ignore", dg.PreviewWarning)

        @dg.asset_check(
            asset=asset_key(settings, "embeddings_array"),
            name=CHECK,
            blocking=True,
            partitions_def=RELEASES,
            description="The last proof covers the current plan and every commit. Reads metadata only.",
        )
        def proved(
            context: dg.AssetCheckExecutionContext, census: CensusResource, store: StoreResource
        ) -> dg.AssetCheckResult:
            from census_tf_dagster.steps.finishing import array_state

            with partition_job(settings, context.op_execution_context.partition_key, census, store) as job:
                state = array_state(job)
            return dg.AssetCheckResult(passed=state == "proved", description=MEANING[state], metadata={"state": state})

    return proved


def report_stale(context: dg.AssetExecutionContext, settings: SetSettings, release: str) -> None:
    """Mark a release's array as no longer proved, from within the run that made it so."""
    # An event of the run: Dagster stores one evaluation a run, and a second without any run is an error.
    context.log_event(
        dg.AssetCheckEvaluation(
            asset_key=asset_key(settings, "embeddings_array"),
            check_name=CHECK,
            passed=False,
            description=MEANING["stale"],
            metadata={"state": "stale"},
            partition=release,
        )
    )
