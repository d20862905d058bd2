"""The asset `embeddings_array` of a set of files, with one partition per file: computes, verifies and records an array.

One run on a GPU node does what a release's shards and array do, with the same functions, because a file is one shard.
"""

from collections.abc import Mapping

import dagster as dg

from census_tf_dagster.config.dagster_names import APPROVAL, ARRAY, PLAN
from census_tf_dagster.config.settings import FileSetSettings
from census_tf_dagster.orchestration.approval_gate import require_approval
from census_tf_dagster.orchestration.asset_support import (
    asset_key,
    asset_of,
    console_link,
    file_partition_context,
    final_failure,
)
from census_tf_dagster.orchestration.assets.shard_embeddings import ShardConfig, ShardProgress, shard_figures
from census_tf_dagster.orchestration.automation import once_approved
from census_tf_dagster.orchestration.checks.quality import upstream_check, upstream_check_spec
from census_tf_dagster.orchestration.checks.rules import as_result, evaluations, file_rule_specs
from census_tf_dagster.orchestration.metadata import titled
from census_tf_dagster.orchestration.partitions import file_partitions
from census_tf_dagster.orchestration.resources import StoreResource


def build_file_embeddings(settings: FileSetSettings, placement: Mapping[str, str]) -> dg.AssetsDefinition:
    """Build the GPU asset of a set of files. The run coordinator copies the placement tags to its runs."""
    key, partitions = asset_key(settings, ARRAY), file_partitions(settings)

    @dg.asset(
        **asset_of(settings, ARRAY),
        partitions_def=partitions,
        deps=[asset_key(settings, name) for name in (PLAN, APPROVAL)],
        kinds={"torch", "tiledb"},
        automation_condition=once_approved(settings.spending, asset_key(settings, APPROVAL)),
        op_tags=placement,
        check_specs=[upstream_check_spec(settings, ARRAY, partitions), *file_rule_specs(settings)],
        description=(
            "The verified TileDB-SOMA array of the embeddings of a file; joinids are the positions of its cells. Cells "
            "are committed megabatch by megabatch. If you run it again, it computes only what is missing or damaged."
        ),
    )
    def embeddings_array(
        context: dg.AssetExecutionContext, config: ShardConfig, store: StoreResource
    ) -> dg.MaterializeResult:  # type: ignore[type-arg]
        from census_tf_dagster.pipeline.embed_shard import SetAsideError, embed_shard
        from census_tf_dagster.pipeline.finish_array import RuleError, finish_array, verify_array
        from census_tf_dagster.pipeline.upstream import find_upstream

        name = context.partition_key
        report = ShardProgress(context, key, name)
        with file_partition_context(settings, name, store, to_embed=True) as opened:
            require_approval(context, settings, name, opened)
            for note in opened.own.progress.notes:
                context.log.warning(note)
            try:
                upstream = find_upstream()
                summary = embed_shard(opened, 0, recompute=config.recompute, upstream=upstream, report=report)
                opened.own.source.require_unchanged()
                finished = finish_array(opened)
            except SetAsideError as error:
                # An automatic retry would meet the same cells.
                raise final_failure(str(error), titled({"set_aside": error.details})) from error
            except RuleError as error:
                for evaluation in evaluations(settings, name, error.findings):
                    context.log_event(evaluation)
                raise final_failure(str(error)) from error
            findings = verify_array(opened)
        return dg.MaterializeResult(
            metadata=titled(
                {
                    **shard_figures(summary, settings.spending.usd_per_gpu_hour),
                    "cells_with_embedding": finished.cells,
                    "features": finished.shape[1],
                    "fragments": finished.fragments,
                    "identity": finished.identity,
                    "file": dg.MetadataValue.path(opened.own.source.name),
                    "array": dg.MetadataValue.path(finished.uri),
                    **console_link(finished.uri, store),
                }
            ),
            check_results=[
                upstream_check(settings, ARRAY, summary.comparison),
                *map(as_result, evaluations(settings, name, findings)),
            ],
        )

    return embeddings_array
