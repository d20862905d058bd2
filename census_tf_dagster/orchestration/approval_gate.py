"""Approvals and costs in Dagster's records: figures of past shards, the cost of work, and the approved plan.

The asset `approval` and the shards use it. The arithmetic of costs belongs to `config.cost`.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import dagster as dg

from census_tf_dagster.config.cost import LAST_SHARDS, NO_RATE, Cost, Throughput, utc_now
from census_tf_dagster.config.dagster_names import APPROVAL, ARRAY, SHARDS
from census_tf_dagster.config.settings import CommonSettings, FileSetSettings
from census_tf_dagster.orchestration.asset_support import asset_key, final_failure
from census_tf_dagster.orchestration.automation import CONDITION_TAG
from census_tf_dagster.orchestration.metadata import values_of

if TYPE_CHECKING:
    from census_tf_dagster.pipeline.context import StoredContext


@dataclass(frozen=True)
class Approval:
    """The last approval of a release."""

    plan: str
    tokens: int
    by: str
    at: str

    def covers(self, plan: str, tokens: int) -> bool:
        """Tell whether it covers a plan: the approved one, or one that needs no more tokens."""
        return plan == self.plan or tokens <= self.tokens


def last_shards(instance: dg.DagsterInstance, settings: CommonSettings) -> list[Throughput]:
    """Return the throughput of a set's last shards or files, from the metadata of their materializations."""
    asset = ARRAY if isinstance(settings, FileSetSettings) else SHARDS
    records = instance.fetch_materializations(asset_key(settings, asset), limit=LAST_SHARDS).records
    found = [record.asset_materialization for record in records]
    return [one for event in found if event and (one := Throughput.of(values_of(event.metadata)))]


def cost_metadata(cost: Cost, settings: CommonSettings) -> dict[str, Any]:
    """Return a cost as metadata of an asset. Unknown figures are the text `unknown`."""
    finish = cost.finish(utc_now())
    spending = settings.spending

    def known(value: float | None, digits: int) -> float | str:
        return "unknown" if value is None else round(value, digits)

    return {
        "tokens_to_compute": cost.tokens,
        "gpu_hours": known(cost.gpu_hours, 3),
        "cost_usd": known(cost.usd, 2),
        "usd_per_gpu_hour": known(spending.usd_per_gpu_hour, 4),
        "fleet_gpus": spending.fleet_gpus or "unknown",
        "days_with_the_fleet": known(cost.days, 4),
        "finish_if_started_now": finish.isoformat(timespec="minutes") if finish else "unknown",
        "tokens_per_second_of_a_gpu": known(cost.rate.tokens_per_second if cost.rate else None, 1),
        "rate": cost.rate.source if cost.rate else f"unknown: {NO_RATE}",
        "auto_start": _rule(settings),
    }


def unit_of(settings: CommonSettings) -> str:
    """Return what a budget is for."""
    return "file" if isinstance(settings, FileSetSettings) else "release"


def _rule(settings: CommonSettings) -> str:
    spending = settings.spending
    if spending.budget_usd is not None:
        return f"up to {spending.budget_usd:,.2f} USD a {unit_of(settings)}"
    return "on" if spending.auto_start else "off"


def approved(instance: dg.DagsterInstance, settings: CommonSettings, release: str) -> Approval | None:
    """Return the last approval of a release; None when there is none."""
    wanted = dg.AssetRecordsFilter(asset_key=asset_key(settings, APPROVAL), asset_partitions=[release])
    for record in instance.fetch_materializations(wanted, limit=1).records:
        event = record.asset_materialization
        figures = values_of(event.metadata) if event else {}
        if "plan" in figures and "tokens_to_compute" in figures:
            at = datetime.fromtimestamp(record.timestamp, UTC).isoformat(timespec="seconds")
            by = str(figures.get("approved_by", "unknown"))
            return Approval(str(figures["plan"]), int(figures["tokens_to_compute"]), by, at)
    return None


def require_approval(
    context: dg.AssetExecutionContext, settings: CommonSettings, release: str, opened: "StoredContext"
) -> None:
    """Refuse a run on a GPU that automation started if the current plan of a release or file is not approved.

    A person who starts a run has already decided. An approval does not cover a later plan that needs more tokens.

    Raises
    ------
    dagster.Failure
        When the approval is missing. Dagster does not retry it.
    """
    if not settings.spending.auto_start or CONDITION_TAG not in context.run.tags:
        return
    from census_tf_dagster.census.plan import read_plan
    from census_tf_dagster.pipeline.cost_estimate import tokens_left
    from census_tf_dagster.store.array import EmbeddingsArray

    # Counting the remaining tokens needs an array that can be opened. `embed_shard` repairs it as well.
    EmbeddingsArray.repair(opened.folder.array, opened.store, opened.identity)
    current = read_plan(opened.store, opened.folder.plan)
    plan, tokens = current.totals.plan, tokens_left(opened, current)
    found = approved(context.instance, settings, release)
    if found is None or not found.covers(plan, tokens):
        was = f"plan {found.plan} ({found.tokens:,} tokens) was, by {found.by}" if found else "no plan was"
        how = (
            f"materialize {settings.name}/{APPROVAL} of {release} in the web interface"
            if isinstance(settings, FileSetSettings)
            else f"run `census-tf-dagster launch {settings.name} {release}`"
        )
        raise final_failure(
            f"plan {plan} of {settings.name} {release} ({tokens:,} tokens) is not approved; {was}. To approve and "
            f"continue, {how}."
        )
