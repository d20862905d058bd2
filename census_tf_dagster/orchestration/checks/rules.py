"""The blocking checks of `embeddings_array`: whether its verification is fresh, and one check for each rule of the array.

Dagster leaves out its own staleness edge at 100 and more upstream partitions, so `verified` says it: it runs after each
materialization and on demand, and whatever makes the verification stale reports it as failed: a shard that commits, another
plan. The rules are checked together: from metadata and the shards' verifications, reading only what came after them.
"""

import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import dagster as dg

from census_tf_dagster.config.dagster_names import ARRAY, VERIFIED_CHECK
from census_tf_dagster.config.settings import SetSettings
from census_tf_dagster.orchestration.asset_support import asset_key, partition_context
from census_tf_dagster.orchestration.partitions import RELEASES
from census_tf_dagster.orchestration.resources import CensusResource, StoreResource

if TYPE_CHECKING:
    from census_tf_dagster.pipeline.context import ReleaseContext
    from census_tf_dagster.store.rules import Finding

RULES = {
    "schema": "A sparse SOMA array of two dimensions: int64 coordinates, float32 values, no coordinate twice.",
    "shape": "As many rows as the Census's obs has, as many columns as the model gives values.",
    "storage_version": "The TileDB storage version of the Census, which its curators ask for. A warning where the set "
    "has no `publication`.",
    "cells": "At least one cell, and exactly the planned ones, less those that were set aside: none is missing, and "
    "none is there that was not planned.",
    "features": "Each cell has each feature exactly once.",
    "values": "All values are finite and those that were written, and no cell is all zero (START is always pooled).",
    "publication": "CxG_embedding_info says what the set's YAML says, and what the array holds.",
    "obs_ids": "obs_ids.parquet beside the array, the list of its cells, is as it was written when it was finished.",
}
"""What `store.rules` checks, here so that definitions load without it."""

MEANING = {
    "verified": "The array is exactly the plan, and nothing was committed since that was verified.",
    "stale": "Plan or commits have changed since the array was verified: materialize embeddings_array again.",
    "unverified": "The array was never verified: materialize embeddings_array.",
}


def build_verified_check(settings: SetSettings) -> dg.AssetChecksDefinition:
    """Build the blocking check of a set's final asset."""
    with warnings.catch_warnings():
        # Partitioned checks are marked as preview in Dagster 1.13; pinned, and covered by tests.
        warnings.simplefilter("ignore", dg.PreviewWarning)

        @dg.asset_check(
            asset=asset_key(settings, ARRAY),
            name=VERIFIED_CHECK,
            blocking=True,
            partitions_def=RELEASES,
            description="The last verification covers the current plan and every commit. Reads metadata only.",
        )
        def verified(
            context: dg.AssetCheckExecutionContext, census: CensusResource, store: StoreResource
        ) -> dg.AssetCheckResult:
            from census_tf_dagster.pipeline.finish_array import array_state

            with partition_context(settings, context.op_execution_context.partition_key, census, store) as opened:
                state = array_state(opened)
            return dg.AssetCheckResult(
                passed=state == "verified", description=MEANING[state], metadata={"state": state}
            )

    return verified


def report_if_stale(
    context: dg.AssetExecutionContext, settings: SetSettings, release: str, opened: "ReleaseContext"
) -> None:
    """Mark a release's array as no longer verified, from within the run that made it so."""
    from census_tf_dagster.pipeline.finish_array import array_state

    if array_state(opened) != "stale":
        return
    # An event of the run: Dagster stores one evaluation a run, and a second without any run is an error.
    context.log_event(
        dg.AssetCheckEvaluation(
            asset_key=asset_key(settings, ARRAY),
            check_name=VERIFIED_CHECK,
            passed=False,
            description=MEANING["stale"],
            metadata={"state": "stale"},
            partition=release,
        )
    )


def build_rule_checks(settings: SetSettings) -> dg.AssetChecksDefinition:
    """Build one blocking check for each rule that the final asset keeps; they run in one step."""
    asset = asset_key(settings, ARRAY)
    with warnings.catch_warnings():
        # As above.
        warnings.simplefilter("ignore", dg.PreviewWarning)
        specs = [
            dg.AssetCheckSpec(name, asset=asset, description=meaning, blocking=True, partitions_def=RELEASES)
            for name, meaning in RULES.items()
        ]

        @dg.multi_asset_check(name=f"{settings.name}__embeddings_array_rules", specs=specs, can_subset=True)
        def rules(
            context: dg.AssetCheckExecutionContext, census: CensusResource, store: StoreResource
        ) -> Iterator[dg.AssetCheckResult]:
            from census_tf_dagster.pipeline.finish_array import RuleError, verify_array

            run = context.op_execution_context
            with partition_context(settings, run.partition_key, census, store) as opened:
                try:
                    findings = verify_array(opened)
                except RuleError as error:
                    findings = error.findings
            for evaluation in evaluations(settings, run.partition_key, findings):
                if evaluation.asset_check_key in run.selected_asset_check_keys:
                    yield dg.AssetCheckResult(
                        asset_key=asset,
                        check_name=evaluation.check_name,
                        passed=evaluation.passed,
                        severity=evaluation.severity,
                        description=evaluation.description,
                        metadata=evaluation.metadata,
                    )

    return rules


def evaluations(
    settings: SetSettings, release: str, findings: "Iterable[Finding]"
) -> Iterator[dg.AssetCheckEvaluation]:
    """Yield what Dagster shows of findings; a rule without one could not be looked at."""
    faults: dict[str, tuple[str, ...]] = {finding.rule: finding.wrong for finding in findings}
    for rule, meaning in RULES.items():
        wrong = faults.get(rule, ("not looked at: a rule that comes before is broken",))
        only_warns = rule == "storage_version" and settings.publication is None
        yield dg.AssetCheckEvaluation(
            asset_key=asset_key(settings, ARRAY),
            check_name=rule,
            passed=not wrong,
            severity=dg.AssetCheckSeverity.WARN if only_warns else dg.AssetCheckSeverity.ERROR,
            description=meaning if not wrong else "\n".join(wrong),
            partition=release,
        )
