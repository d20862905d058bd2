"""The blocking checks of `embeddings_array`: `verified`, and one check for each rule of the array.

`verified` says whether the verification is still valid, because Dagster shows no staleness at 100 or more upstream
partitions. The check runs after each materialization and on demand. A shard that commits, and a new plan, also report
it as failed. The rules are checked together, from metadata and from the shards' verifications; only values committed
later are read again. The algorithms belong to `store.rules` and `pipeline.finish_array`.
"""

import warnings
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import dagster as dg

from census_tf_dagster.config.dagster_names import ARRAY, VERIFIED_CHECK
from census_tf_dagster.config.settings import CommonSettings, FileSetSettings, SetSettings
from census_tf_dagster.orchestration.asset_support import asset_key, partition_context
from census_tf_dagster.orchestration.metadata import titled
from census_tf_dagster.orchestration.partitions import RELEASES, file_partitions
from census_tf_dagster.orchestration.resources import CensusResource, StoreResource

if TYPE_CHECKING:
    from census_tf_dagster.pipeline.context import PlannedContext
    from census_tf_dagster.store.rules import Finding

RULES = {
    "schema": "The array is a sparse SOMA array of two dimensions, with int64 coordinates, float32 values and no "
    "duplicate coordinates.",
    "shape": "The array has as many rows as the Census's obs (or as the file has cells), and as many columns as the "
    "model's embedding has values.",
    "storage_version": "The array has the TileDB storage version of the Census, which its curators require. This is "
    "only a warning when the set has no `publication`.",
    "cells": "The array has at least one cell, and exactly the planned cells except those that were set aside.",
    "features": "Each cell has each feature exactly once.",
    "values": "All values are finite and equal to those that were written, and no cell is all zero (START is always "
    "pooled).",
    "publication": "CxG_embedding_info agrees with the set's YAML and with the array.",
    "obs_ids": "obs_ids.parquet beside the array, the list of its cells, has not changed since the array was finished.",
}
"""The rules that `store.rules` checks. They are here so that definitions load without that module."""

MEANING = {
    "verified": "The array agrees with the plan, and nothing was committed since its verification.",
    "stale": "The plan or the committed values have changed since the array was verified. Materialize embeddings_array "
    "again.",
    "unverified": "The array was never verified. Materialize embeddings_array.",
}


OF_A_CENSUS = ("storage_version", "publication")
"""The rules that files of one's own need not keep."""


def build_verified_check(settings: SetSettings) -> dg.AssetChecksDefinition:
    """Build the blocking check `verified` of a set's array."""
    with warnings.catch_warnings():
        # Dagster 1.13 marks partitioned checks as preview. Its version is pinned, and tests cover them.
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
                passed=state == "verified", description=MEANING[state], metadata=titled({"state": state})
            )

    return verified


def report_if_stale(
    context: dg.AssetExecutionContext, settings: SetSettings, release: str, opened: "PlannedContext"
) -> None:
    """Report a release's array as no longer verified, within the run that changed it."""
    from census_tf_dagster.pipeline.finish_array import array_state

    if array_state(opened) != "stale":
        return
    # This is an event of the run. Dagster stores one evaluation per run, and refuses a second one without a run.
    context.log_event(
        dg.AssetCheckEvaluation(
            asset_key=asset_key(settings, ARRAY),
            check_name=VERIFIED_CHECK,
            passed=False,
            description=MEANING["stale"],
            metadata=titled({"state": "stale"}),
            partition=release,
        )
    )


def build_rule_checks(settings: SetSettings) -> dg.AssetChecksDefinition:
    """Build one blocking check for each rule of a set's array. All of them run in one step."""
    asset = asset_key(settings, ARRAY)
    with warnings.catch_warnings():
        # See above.
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
                    yield as_result(evaluation)

    return rules


def as_result(evaluation: dg.AssetCheckEvaluation) -> dg.AssetCheckResult:
    """Return an evaluation as the result that a step returns."""
    return dg.AssetCheckResult(
        asset_key=evaluation.asset_key,
        check_name=evaluation.check_name,
        passed=evaluation.passed,
        severity=evaluation.severity,
        description=evaluation.description,
        metadata=evaluation.metadata,
    )


def file_rule_specs(settings: FileSetSettings) -> list[dg.AssetCheckSpec]:
    """Return the checks of the rules for the array of a file. The run that embeds the file evaluates them."""
    with warnings.catch_warnings():
        # See above.
        warnings.simplefilter("ignore", dg.PreviewWarning)
        return [
            dg.AssetCheckSpec(
                rule, asset=asset_key(settings, ARRAY), description=meaning, partitions_def=file_partitions(settings)
            )
            for rule, meaning in RULES.items()
            if rule not in OF_A_CENSUS
        ]


def evaluations(
    settings: CommonSettings, release: str, findings: "Iterable[Finding]"
) -> Iterator[dg.AssetCheckEvaluation]:
    """Yield one check result per rule. A rule without a finding was not checked."""
    faults: dict[str, tuple[str, ...]] = {finding.rule: finding.wrong for finding in findings}
    for rule, meaning in RULES.items():
        if rule in OF_A_CENSUS and isinstance(settings, FileSetSettings):
            continue
        wrong = faults.get(rule, ("not checked, because an earlier rule is broken",))
        publishes = isinstance(settings, SetSettings) and settings.publication is not None
        only_warns = rule == "storage_version" and not publishes
        yield dg.AssetCheckEvaluation(
            asset_key=asset_key(settings, ARRAY),
            check_name=rule,
            passed=not wrong,
            severity=dg.AssetCheckSeverity.WARN if only_warns else dg.AssetCheckSeverity.ERROR,
            description=meaning if not wrong else "\n".join(wrong),
            partition=release,
        )
