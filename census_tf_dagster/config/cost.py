"""The cost of a set's work, and what it may spend without approval.

This module computes with rates, prices and budgets. The Dagster asset `approval` uses the answer; reading records and
counting tokens belong elsewhere.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

GpuType = Literal["L4", "A10G", "L40S", "A100", "H100", "H200"]

ROOF_TFLOPS: dict[str, float] = {"L4": 121, "A10G": 70, "L40S": 362, "A100": 312, "H100": 989, "H200": 790}
"""Peak dense 16-bit arithmetic per second, from NVIDIA's data sheets; for the H200 a measured value."""

FLOP_PER_TOKEN = 1.14e12 / 1802
"""For the shape of the real checkpoints, counted for a cell of 1,800 genes, assay and START (docs/performance.md)."""

ASSUMED_SHARE = 0.25
"""The share of the peak that is assumed before anything was measured. It is a cautious guess; a canary replaces it."""

NO_RATE = "no shard and no canary has run, and neither placement.yaml nor the set's `placement` declares gpu_type"

LONGEST_DAYS = 36525.0
"""Finish times later than this are not computed (a hundred years)."""

LAST_SHARDS = 96
"""A measured rate is the mean of at most this many of a set's last shards."""


class Budget(BaseModel):
    """The most that a release or file may cost and still start automatically."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    budget: float = Field(
        gt=0,
        le=1_000_000_000,
        allow_inf_nan=False,
        description="US dollars that one release or file of this set may cost without a person's approval.",
    )


@dataclass(frozen=True)
class Spending:
    """A set's rule for automatic starts, and the prices of its work.

    Attributes
    ----------
    auto_start
        Whether new releases start automatically.
    budget_usd
        What one release may cost without approval; None: no limit.
    gpu_type
        GPU type of the fleet; None when it is not declared.
    usd_per_gpu_hour
        Price of an hour of one GPU, its share of the node included; None when it is not declared.
    fleet_gpus
        GPUs that work at the same time; None when it is not declared.
    """

    auto_start: bool = False
    budget_usd: float | None = None
    gpu_type: str | None = None
    usd_per_gpu_hour: float | None = None
    fleet_gpus: int | None = None


@dataclass(frozen=True)
class Throughput:
    """How many tokens of a set some devices have computed, and the paid time that they took."""

    tokens: float
    seconds: float
    devices: int
    device: str

    @classmethod
    def of(cls, figures: Mapping[str, Any]) -> Self | None:
        """Read it from the metadata of a shard's materialization; None when the shard computed nothing."""
        try:
            devices = str(figures["devices"]).split(", ")
            seconds = sum(float(figures[f"seconds_{name}"]) for name in ("load", "work", "verification"))
            return cls(float(figures["tokens_computed"]), seconds, len(devices), devices[0])
        except KeyError:
            return None


@dataclass(frozen=True)
class Rate:
    """How fast one GPU works on a set, and the source of that figure."""

    tokens_per_second: float
    source: str
    measured: bool


@dataclass(frozen=True)
class Cost:
    """The GPU time, money and days that some tokens of a set take. None: not known yet."""

    tokens: int
    rate: Rate | None
    gpu_hours: float | None
    usd: float | None
    days: float | None
    """Days with the whole fleet at work."""

    def finish(self, now: datetime) -> datetime | None:
        """Return when the fleet would finish if it started now, at most a hundred years from now; None: not known."""
        return None if self.days is None else now + timedelta(days=min(self.days, LONGEST_DAYS))

    def __str__(self) -> str:
        hours = "unknown GPU hours" if self.gpu_hours is None else f"{self.gpu_hours:,.1f} GPU hours"
        money = "unknown cost" if self.usd is None else f"{self.usd:,.2f} USD"
        time = "unknown time" if self.days is None else f"{self.days:,.1f} days with the fleet"
        source = self.rate.source if self.rate else NO_RATE
        return f"{self.tokens:,} tokens to compute, {hours}, {money}, {time} (rate: {source})"


def choose_rate(shards: Iterable[Throughput], canary: Throughput | None, gpu_type: str | None) -> Rate | None:
    """Choose the rate of one GPU: measured by shards of the set, else by its canary, else assumed; None: not known.

    Parameters
    ----------
    shards
        Figures of the set's last shards.
    canary
        Figures of the set's canary.
    gpu_type
        GPU type of the fleet. Figures of other types are ignored.
    """
    fitting = [one for one in shards if one.tokens and _is_of(one.device, gpu_type)]
    if fitting:
        gpu_seconds = sum(one.seconds * one.devices for one in fitting)
        devices = ", ".join(sorted({one.device for one in fitting}))
        source = f"measured: the last {len(fitting)} shards of this set on {devices}"
        return Rate(sum(one.tokens for one in fitting) / gpu_seconds, source, measured=True)
    if canary is not None and canary.tokens and _is_of(canary.device, gpu_type):
        rate = canary.tokens / (canary.seconds * canary.devices)
        return Rate(rate, f"measured: the canary of this set on {canary.device}", measured=True)
    if gpu_type in ROOF_TFLOPS:
        rate = ROOF_TFLOPS[gpu_type] * 1e12 * ASSUMED_SHARE / FLOP_PER_TOKEN
        source = f"ASSUMED: {ASSUMED_SHARE:.0%} of the peak arithmetic of the {gpu_type}; run a canary to measure it"
        return Rate(rate, source, measured=False)
    return None


def _is_of(device: str, gpu_type: str | None) -> bool:
    return gpu_type is None or gpu_type in device.replace("-", " ").split()


def cost_of(tokens: int, rate: Rate | None, spending: Spending) -> Cost:
    """Return what `tokens` cost at a rate and at the set's prices."""
    hours = 0.0 if not tokens else None if rate is None else tokens / rate.tokens_per_second / 3600
    price, fleet = spending.usd_per_gpu_hour, spending.fleet_gpus
    return Cost(
        tokens=tokens,
        rate=rate,
        gpu_hours=hours,
        usd=None if hours is None or price is None else hours * price,
        days=None if hours is None or fleet is None else hours / fleet / 24,
    )


def objections(cost: Cost, spending: Spending, unit: str = "release") -> list[str]:
    """Return the reasons why a person must approve the cost of a release or file (`unit`); none when nobody must."""
    budget = spending.budget_usd
    if not spending.auto_start:
        return ["`auto_start` of this set is off"]
    if budget is None or (cost.usd is not None and cost.usd <= budget):
        return []
    if cost.usd is None:
        return [f"the cost is unknown, and the budget is {budget:,.2f} USD a {unit}"]
    return [
        f"it costs {cost.usd:,.2f} USD, {cost.usd - budget:,.2f} USD above the budget of {budget:,.2f} USD a {unit}"
    ]


def utc_now() -> datetime:
    """Return the present time in UTC."""
    return datetime.now(UTC)
