"""The quality of a release as asset checks with pictures. They never block; they tell a person what to look at.

They run in their own step after `embeddings_array` is materialized, so that a picture can neither delay nor undo a
verification. Execute the checks to make them again. An observation carries the pictures to the asset's page. The
measures belong to `quality`, and the report to `pipeline.assess_quality`.
"""

import base64
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import dagster as dg

from census_tf_dagster.config.dagster_names import ARRAY, UPSTREAM_CHECK
from census_tf_dagster.config.settings import CommonSettings, SetSettings
from census_tf_dagster.config.thresholds import (
    LEAST_DEVIATIONS,
    LEAST_EXCESS,
    LEAST_RANK,
    MOST_SHIFT,
    MOST_SPREAD,
    upstream_bound,
)
from census_tf_dagster.orchestration.asset_support import asset_key, partition_context
from census_tf_dagster.orchestration.metadata import titled
from census_tf_dagster.orchestration.partitions import RELEASES
from census_tf_dagster.orchestration.resources import CensusResource, StoreResource

if TYPE_CHECKING:
    from census_tf_dagster.quality.report import Report
    from census_tf_dagster.quality.upstream_comparison import UpstreamComparison
    from census_tf_dagster.quality.verdicts import Verdict

CHECKS = {
    "neighbours_share_cell_type": "Neighbouring cells have the same type more often than when types are shuffled "
    f"within each dataset: at least {LEAST_EXCESS} of the way from chance to perfect, and by at least "
    f"{LEAST_DEVIATIONS:g} standard deviations. If not, the embeddings tell little about cells. Check whether the "
    "checkpoint is the right one, and whether its vocabulary covers the organism.",
    "no_collapsed_dimensions": "Each dimension varies over the sample: its standard deviation is at least a thousandth "
    "of the median one. A constant dimension is an error; one that hardly varies is a warning.",
    "drift_from_previous_release": "Cell types have the same place as in the set's previous release: their means have "
    f"moved by at most {MOST_SHIFT} standard deviations, and their spread by at most a factor of {2**MOST_SPREAD:.2f}. "
    "If not, do not compare cells of the two releases before you know the reason.",
    "gene_ids_fit_counts": "Genes that nearly every cell needs (ribosome, respiratory chain) are expressed in more "
    f"cells than other genes, in at least {LEAST_RANK:.0%} of pairs, and `var` and X agree on which genes are "
    "expressed. If not, the genes are in the wrong order or of another species. `same_as_upstream` cannot show this, "
    "because it reads the same `var`.",
    "same_as_upstream": "Upstream's own code embedded a few cells of every shard again, and its values agree with the "
    "array within the bound of the set's precision.",
}
"""The checks of `pipeline.assess_quality`. They are here so that definitions load without that module."""

MOST_ROWS = 50
"""The most rows of a table in Dagster's event log. `qc/report.json` has all of them."""


def build_quality_checks(settings: SetSettings) -> dg.AssetChecksDefinition:
    """Build the quality checks of a set's array. All of them run in one step."""
    asset = asset_key(settings, ARRAY)
    with warnings.catch_warnings():
        # Dagster 1.13 marks partitioned checks as preview. Its version is pinned, and tests cover them.
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
                    # A report that cannot be made does not change that the array is verified.
                    context.log.exception("the quality report could not be made")
                    said = f"Not checked: the quality report could not be made ({type(error).__name__}: {error})"
                    verdicts = dict.fromkeys(CHECKS, Verdict(False, said, compared=False))
                else:
                    verdicts = dict(report.verdicts)
                    metadata = titled({**shown(report), "folder": dg.MetadataValue.path(opened.folder.qc)})
                    run.log_event(dg.AssetObservation(asset_key=asset, partition=run.partition_key, metadata=metadata))
            for name, verdict in verdicts.items():
                if dg.AssetCheckKey(asset, name) in run.selected_asset_check_keys:
                    yield _result(asset, name, verdict)

    return quality


def upstream_check_spec(
    settings: CommonSettings, asset: str, partitions: dg.PartitionsDefinition[str]
) -> dg.AssetCheckSpec:
    """Return the check `same_as_upstream` of the asset that computes a set's embeddings."""
    bound = upstream_bound(settings.compute_precision, settings.storage_precision)
    with warnings.catch_warnings():
        # See above.
        warnings.simplefilter("ignore", dg.PreviewWarning)
        return dg.AssetCheckSpec(
            UPSTREAM_CHECK,
            asset=asset_key(settings, asset),
            partitions_def=partitions,
            description="Upstream's own code embeds a few of these cells in float32 on the same device. No "
            f"cell differs from the array by more than {bound:.1e} of its norm. If this cannot be done, the result is "
            "a warning, except for sets with `device: cpu` where upstream is not installed: these are small trials.",
        )


def upstream_check(
    settings: CommonSettings, asset: str, comparison: "UpstreamComparison | None"
) -> dg.AssetCheckResult:
    """Return the result of comparing with upstream's own code; None: there are no cells."""
    from census_tf_dagster.quality.verdicts import Verdict, of_comparison

    verdict = (
        of_comparison(comparison, may_lack_upstream=settings.may_lack_upstream)
        if comparison
        else Verdict(True, "The shard has no cells.", compared=False)
    )
    return _result(asset_key(settings, asset), UPSTREAM_CHECK, verdict)


def shown(report: "Report") -> dict[str, Any]:
    """Return a report as metadata for people: pictures, tables and figures."""
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
        metadata=titled(verdict.figures),
    )
