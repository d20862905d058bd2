"""The quality of a release as asset checks, with pictures. None of them blocks: they say whether to look, and where.

They run as a step of their own after `embeddings_array` is materialized, so that no picture can hold up or undo a
verification; to make them again, execute the checks. What they show stands on the asset's page: an observation carries the
pictures.
"""

import base64
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import dagster as dg

from census_tf_dagster.config.dagster_names import ARRAY, SHARDS, UPSTREAM_CHECK
from census_tf_dagster.config.settings import SetSettings
from census_tf_dagster.config.thresholds import (
    LEAST_DEVIATIONS,
    LEAST_EXCESS,
    LEAST_RANK,
    MOST_SHIFT,
    MOST_SPREAD,
    upstream_bound,
)
from census_tf_dagster.orchestration.asset_support import asset_key, partition_context
from census_tf_dagster.orchestration.partitions import RELEASES, shard_partitions
from census_tf_dagster.orchestration.resources import CensusResource, StoreResource

if TYPE_CHECKING:
    from census_tf_dagster.quality.report import Report
    from census_tf_dagster.quality.upstream_comparison import UpstreamComparison
    from census_tf_dagster.quality.verdicts import Verdict

CHECKS = {
    "neighbours_share_cell_type": "Cells that lie next to each other are more often of one type than when types are "
    f"shuffled within each dataset: at least {LEAST_EXCESS} of the way from chance to perfect, by at least "
    f"{LEAST_DEVIATIONS:g} standard deviations. If not, the embeddings tell little about cells: is the checkpoint the "
    "right one, and the organism within its vocabulary?",
    "no_collapsed_dimensions": "Each dimension varies over the sample: its standard deviation is at least a thousandth "
    "of the median one. A constant dimension is a fault; one that hardly varies is a reason to look.",
    "drift_from_previous_release": "Cell types lie where they lay in the set's previous release: their means have "
    f"moved by at most {MOST_SHIFT} standard deviations, their spread by at most a factor of {2**MOST_SPREAD:.2f}. If "
    "not, cells of the two releases should not be compared before somebody knows why.",
    "gene_ids_fit_counts": "Genes that nearly every cell needs (ribosome, respiratory chain) are expressed by more "
    f"cells than others, in at least {LEAST_RANK:.0%} of pairs, and `var` and X agree on which genes are. "
    "If not, the gene axis is permuted or another species': `same_as_upstream` reads the same `var` and cannot tell.",
    "same_as_upstream": "In every shard a few cells were embedded again by upstream's own code, and the array holds "
    "the same values within the bound of the set's precision.",
}
"""What `steps.quality` judges, here so that definitions load without it."""

MOST_ROWS = 50
"""Of a table in Dagster's event log; `qc/report.json` has all."""


def build_quality_checks(settings: SetSettings) -> dg.AssetChecksDefinition:
    """Build the checks of a set's finished arrays; they run in one step."""
    asset = asset_key(settings, ARRAY)
    with warnings.catch_warnings():
        # Partitioned checks are marked as preview in Dagster 1.13; pinned, and covered by tests.
        warnings.simplefilter("ignore", dg.PreviewWarning)
        specs = [
            dg.AssetCheckSpec(name, asset=asset, description=meaning, partitions_def=RELEASES)
            for name, meaning in CHECKS.items()
        ]

        @dg.multi_asset_check(name=f"{settings.name}__embeddings_array_quality", specs=specs, can_subset=True)
        def quality(
            context: dg.AssetCheckExecutionContext, census: CensusResource, store: StoreResource
        ) -> Iterator[dg.AssetCheckResult]:
            from census_tf_dagster.pipeline.assess_quality import assess
            from census_tf_dagster.quality.verdicts import Verdict

            run = context.op_execution_context
            with partition_context(settings, run.partition_key, census, store) as opened:
                try:
                    report = assess(opened, say=context.log.info)
                except Exception as error:
                    # The array is verified whether or not it can be pictured.
                    context.log.exception("the quality report could not be made")
                    said = f"Not looked at: the quality report could not be made ({type(error).__name__}: {error})"
                    verdicts = dict.fromkeys(CHECKS, Verdict(False, said))
                else:
                    verdicts = dict(report.verdicts)
                    metadata = {**shown(report), "folder": dg.MetadataValue.path(opened.folder.qc)}
                    run.log_event(dg.AssetObservation(asset_key=asset, partition=run.partition_key, metadata=metadata))
            for name, verdict in verdicts.items():
                if dg.AssetCheckKey(asset, name) in run.selected_asset_check_keys:
                    yield _result(asset, name, verdict)

    return quality


def shard_check_spec(settings: SetSettings) -> dg.AssetCheckSpec:
    """Return the check that a shard makes of itself."""
    bound = upstream_bound(settings.compute_precision, settings.storage_precision)
    with warnings.catch_warnings():
        # As above.
        warnings.simplefilter("ignore", dg.PreviewWarning)
        return dg.AssetCheckSpec(
            UPSTREAM_CHECK,
            asset=asset_key(settings, SHARDS),
            partitions_def=shard_partitions(settings.shards),
            description="A few of the shard's cells, embedded by upstream's own code in float32 on the shard's device, "
            f"are those of the array: none differs by more than {bound:.1e} of its norm. A warning where that could "
            "not be done.",
        )


def shard_check(settings: SetSettings, comparison: "UpstreamComparison | None") -> dg.AssetCheckResult:
    """Return what upstream's own code made of a shard; None: it has no cells."""
    from census_tf_dagster.quality.verdicts import Verdict, of_comparison

    verdict = of_comparison(comparison) if comparison else Verdict(True, "The shard has no cells.")
    return _result(asset_key(settings, SHARDS), UPSTREAM_CHECK, verdict)


def shown(report: "Report") -> dict[str, Any]:
    """Return a report as metadata that a person reads: pictures, tables, figures."""
    metadata: dict[str, Any] = {}
    for name, content in report.pictures.items():
        encoded = base64.b64encode(content).decode()
        metadata[name] = dg.MetadataValue.md(f"![{name}](data:image/png;base64,{encoded})")
    for column, rows in report.coverage.items():
        records = [
            dg.TableRecord(
                {
                    column: row.name,
                    "cells": row.cells,
                    "planned": row.planned,
                    "embedded": row.embedded,
                    "embedded_share": round(row.embedded / row.cells, 4),
                }
            )
            for row in rows[:MOST_ROWS]
        ]
        metadata[f"coverage_by_{column.removesuffix('_id').removesuffix('_general')}"] = dg.MetadataValue.table(records)
    genes = report.genes_per_cell
    return metadata | {
        "sampled_cells": report.about["sample"]["cells"],
        "sampled_cells_without_counts": report.about["sample"]["without_counts"],
        "genes_per_cell_median": genes["quantile_0.5"],
        "cells_over_window": genes["cells_over_window"],
        "cells_over_window_share": round(genes["share_over_window"], 4),
        "counts_outside_vocabulary_share": round(report.vocabulary["counts_outside"], 4),
        "seconds": round(sum(report.seconds.values()), 1),
    }


def _result(asset: dg.AssetKey, name: str, verdict: "Verdict") -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        asset_key=asset,
        check_name=name,
        passed=verdict.passed,
        severity=dg.AssetCheckSeverity.ERROR if verdict.grave else dg.AssetCheckSeverity.WARN,
        description=verdict.text,
        metadata=verdict.figures,
    )
