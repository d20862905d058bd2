"""The checks of `embeddings_index`: whether it holds the array's cells unharmed, and how well it finds neighbours."""

import warnings
from collections.abc import Iterator

import dagster as dg

from census_tf_dagster.config.dagster_names import INDEX
from census_tf_dagster.config.settings import SetSettings
from census_tf_dagster.config.thresholds import LEAST_RECALL
from census_tf_dagster.errors import UserError
from census_tf_dagster.orchestration.asset_support import asset_key, partition_context
from census_tf_dagster.orchestration.metadata import titled
from census_tf_dagster.orchestration.partitions import RELEASES
from census_tf_dagster.orchestration.resources import CensusResource, StoreResource

CELLS_CHECK, RECALL_CHECK = "index_cells", "index_recall"
CHECKS = {
    CELLS_CHECK: "The index belongs to the array as it is, its files are as they were written, and it holds each cell "
    "that has counts and an embedding exactly once.",
    RECALL_CHECK: f"The index finds at least {LEAST_RECALL:.0%} of the exact 10 nearest neighbours of a fixed sample "
    "of cells.",
}


def build_index_checks(settings: SetSettings) -> dg.AssetChecksDefinition:
    """Build the checks of a set's index. Both run in one step."""
    asset = asset_key(settings, INDEX)
    with warnings.catch_warnings():
        # Dagster 1.13 marks partitioned checks as preview. Its version is pinned, and tests cover them.
        warnings.simplefilter("ignore", dg.PreviewWarning)
        specs = [
            dg.AssetCheckSpec(name, asset=asset, description=meaning, partitions_def=RELEASES)
            for name, meaning in CHECKS.items()
        ]

        @dg.multi_asset_check(name=f"{settings.name}__embeddings_index_checks", specs=specs, can_subset=True)
        def index_checks(
            context: dg.AssetCheckExecutionContext, census: CensusResource, store: StoreResource
        ) -> Iterator[dg.AssetCheckResult]:
            from census_tf_dagster.pipeline.index_array import index_faults, measured_recall

            run = context.op_execution_context
            selected = {key.name for key in run.selected_asset_check_keys}
            with partition_context(settings, run.partition_key, census, store) as opened:
                if CELLS_CHECK in selected:
                    faults = index_faults(opened)
                    yield dg.AssetCheckResult(
                        asset_key=asset,
                        check_name=CELLS_CHECK,
                        passed=not faults,
                        description="; ".join(faults) or "The index holds each cell exactly once.",
                    )
                if RECALL_CHECK in selected:
                    try:
                        recall = measured_recall(opened)
                    except UserError as error:
                        yield dg.AssetCheckResult(
                            asset_key=asset, check_name=RECALL_CHECK, passed=False, description=str(error)
                        )
                        return
                    yield dg.AssetCheckResult(
                        asset_key=asset,
                        check_name=RECALL_CHECK,
                        passed=recall >= LEAST_RECALL,
                        severity=dg.AssetCheckSeverity.WARN,
                        description=f"The index finds {recall:.1%} of the exact nearest neighbours; expected at least "
                        f"{LEAST_RECALL:.0%}.",
                        metadata=titled({"recall": round(recall, 4)}),
                    )

    return index_checks
