"""The asset `approval`, with one partition per release or file: nothing is spent on a plan before it is approved.

When automation runs it, it materializes if the cost is within the set's budget; otherwise it reports why it needs a
person, and the shards wait. When a person materializes it, that person approves. Its metadata has the approved plan.
"""

from collections.abc import Iterator

import dagster as dg

from census_tf_dagster.config.cost import objections, utc_now
from census_tf_dagster.config.dagster_names import APPROVAL, PLAN
from census_tf_dagster.config.settings import CommonSettings, SetSettings
from census_tf_dagster.errors import UserError
from census_tf_dagster.orchestration.approval_gate import approved, cost_metadata, last_shards, unit_of
from census_tf_dagster.orchestration.asset_support import asset_key, asset_of, whole_context
from census_tf_dagster.orchestration.automation import is_automatic, whenever_planned
from census_tf_dagster.orchestration.metadata import titled
from census_tf_dagster.orchestration.partitions import whole_partitions
from census_tf_dagster.orchestration.resources import CensusResource, StoreResource


class ApprovalConfig(dg.Config):
    """The run configuration of an approval."""

    plan: str = ""
    """Approve only if this is the current plan; empty: approve the current plan."""
    by: str = ""
    """The name of the person who approves, for the record."""


def build_approval(settings: CommonSettings) -> dg.AssetsDefinition:
    """Build the approval asset of a set."""
    key, unit = asset_key(settings, APPROVAL), unit_of(settings)

    @dg.asset(
        **asset_of(settings, APPROVAL),
        partitions_def=whole_partitions(settings),
        deps=[asset_key(settings, PLAN)],
        output_required=False,
        automation_condition=whenever_planned(settings.spending),
        description=(
            f"The approval to spend money on a {unit}. It is automatic within the set's `auto_start`; above that, the "
            f"{unit} waits. Materialize a partition to approve its current plan."
        ),
    )
    def approval(
        context: dg.AssetExecutionContext, config: ApprovalConfig, census: CensusResource, store: StoreResource
    ) -> Iterator[dg.MaterializeResult[None]]:
        from census_tf_dagster.census.plan import read_plan
        from census_tf_dagster.pipeline.cost_estimate import estimate, tokens_left

        release = context.partition_key
        with whole_context(settings, release, census, store) as opened:
            found = read_plan(opened.store, opened.folder.plan)
            plan = found.totals.plan
            if config.plan not in ("", plan):
                raise UserError(
                    f"the plan to approve is {config.plan}; expected {plan}, which is current. Read that plan, then "
                    "approve it."
                )
            cost = estimate(opened, tokens_left(opened, found), last_shards(context.instance, settings))
        figures = {"plan": plan, **cost_metadata(cost, settings)}
        if not is_automatic(context.run.tags):
            yield dg.MaterializeResult(metadata=titled({"approved_by": config.by or "a person, in Dagster", **figures}))
            return
        earlier = approved(context.instance, settings, release)
        if earlier and earlier.covers(plan, cost.tokens):
            context.log.info(f"approved on {earlier.at} by {earlier.by}; that approval covers this plan")
            return
        against = objections(cost, settings.spending, unit)
        if isinstance(settings, SetSettings) and (listed := census.listed(release)):
            against += listed.objections(cost.finish(utc_now()))
        if not against:
            budget = settings.spending.budget_usd
            by = "auto_start: on" if budget is None else f"auto_start: within the budget of {budget:,.2f} USD a {unit}"
            yield dg.MaterializeResult(metadata=titled({"approved_by": by, **figures}))
            return
        command = f", or run `census-tf-dagster approve {settings.name} {release}`"
        question = (
            f"{settings.name} {release} waits for your approval: {'; '.join(against)}. The work: {cost}. To approve, "
            f"materialize {settings.name}/approval of {release} in the web interface"
            f"{command if isinstance(settings, SetSettings) else ''}."
        )
        context.log.warning(question)
        context.log_event(
            dg.AssetObservation(
                asset_key=key,
                partition=release,
                description=question,
                metadata=titled({"waits_for_approval": question, **figures}),
            )
        )

    return approval
