"""What a set may spend by itself, and what its work costs: rates, prices, and the answer of the gate."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

GpuType = Literal["L4", "A10G", "L40S", "A100", "H100", "H200"]

ROOF_TFLOPS: dict[str, float] = {"L4": 121, "A10G": 70, "L40S": 362, "A100": 312, "H100": 989, "H200": 790}
"""Dense 16-bit arithmetic a second: NVIDIA's data sheets, for the H200 what was measured."""

FLOP_PER_TOKEN = 1.14e12 / 1802
"""Of the real checkpoints' shape: counted for a cell of 1,800 genes, assay and START (docs/performance.md)."""

ASSUMED_SHARE = 0.25
"""Of the roof, where nothing was measured. A guess, on the careful side: replace it with a canary."""


NO_RATE = "no shard has run, no canary, and no gpu_type is declared, in placement.yaml or in the set's `placement`"

LONGEST_DAYS = 36525.0

LAST_SHARDS = 96
"""How many of the last shards of a set a rate is taken from."""


class Budget(BaseModel):
    """Start by itself what costs no more than this."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    budget: float = Field(
        gt=0,
        le=1_000_000_000,
        allow_inf_nan=False,
        description="US dollars that one release of this set may cost without being asked.",
    )


@dataclass(frozen=True)
class Spending:
    """A set's rule for starting by itself, and what its work is priced with.

    Attributes
    ----------
    auto_start
        Whether new releases start by themselves.
    budget_usd
        What one release may cost then; None: no limit.
    gpu_type
        The fleet's GPU; None when the deployment does not say.
    usd_per_gpu_hour
        Price of an hour of one GPU with its node; None when the deployment does not say.
    fleet_gpus
        GPUs that work at once; None when the deployment does not say.
    """

    auto_start: bool = False
    budget_usd: float | None = None
    gpu_type: str | None = None
    usd_per_gpu_hour: float | None = None
    fleet_gpus: int | None = None


@dataclass(frozen=True)
class Throughput:
    """What some device has done of a set, paid time included."""

    tokens: float
    seconds: float
    devices: int
    device: str

    @classmethod
    def of(cls, figures: Mapping[str, Any]) -> Self | None:
        """Make one of the figures that a shard's materialization shows; None when it computed nothing."""
        try:
            devices = str(figures["devices"]).split(", ")
            seconds = sum(float(figures[f"seconds_{name}"]) for name in ("load", "work", "verification"))
            return cls(float(figures["tokens_computed"]), seconds, len(devices), devices[0])
        except KeyError:
            return None


@dataclass(frozen=True)
class Rate:
    """How fast one GPU works on a set, and who says so."""

    tokens_per_second: float
    source: str
    measured: bool


@dataclass(frozen=True)
class Cost:
    """What some tokens of a set take. None stands for what nobody can say yet."""

    tokens: int
    rate: Rate | None
    gpu_hours: float | None
    usd: float | None
    days: float | None
    """With the whole fleet at work."""

    def finish(self, now: datetime) -> datetime | None:
        """Return when the fleet would be done if it started now; never later than in a hundred years."""
        return None if self.days is None else now + timedelta(days=min(self.days, LONGEST_DAYS))

    def __str__(self) -> str:
        hours = "unknown GPU hours" if self.gpu_hours is None else f"{self.gpu_hours:,.1f} GPU hours"
        money = "unknown cost" if self.usd is None else f"{self.usd:,.2f} USD"
        time = "unknown time" if self.days is None else f"{self.days:,.1f} days with the fleet"
        source = self.rate.source if self.rate else NO_RATE
        return f"{self.tokens:,} tokens to compute, {hours}, {money}, {time} (rate: {source})"


def choose_rate(shards: Iterable[Throughput], canary: Throughput | None, gpu_type: str | None) -> Rate | None:
    """Take the best known rate of one GPU: what shards of the set did, else its canary, else an assumption.

    Parameters
    ----------
    shards
        What the last shards did.
    canary
        What the set's canary did.
    gpu_type
        The fleet's; what another type has done says nothing about it.
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
        source = f"ASSUMED: {ASSUMED_SHARE:.0%} of the arithmetic that a {gpu_type} can do; run a canary to know"
        return Rate(rate, source, measured=False)
    return None


def _is_of(device: str, gpu_type: str | None) -> bool:
    return gpu_type is None or gpu_type in device.replace("-", " ").split()


def cost_of(tokens: int, rate: Rate | None, spending: Spending) -> Cost:
    """Work out what `tokens` take at a rate, at the set's prices."""
    hours = 0.0 if not tokens else None if rate is None else tokens / rate.tokens_per_second / 3600
    price, fleet = spending.usd_per_gpu_hour, spending.fleet_gpus
    return Cost(
        tokens=tokens,
        rate=rate,
        gpu_hours=hours,
        usd=None if hours is None or price is None else hours * price,
        days=None if hours is None or fleet is None else hours / fleet / 24,
    )


def objections(cost: Cost, spending: Spending) -> list[str]:
    """Say why money may not be spent without a person; nothing when it may."""
    budget = spending.budget_usd
    if not spending.auto_start:
        return ["`auto_start` of this set is off"]
    if budget is None or (cost.usd is not None and cost.usd <= budget):
        return []
    if cost.usd is None:
        return [f"the cost is unknown, and the budget is {budget:,.2f} USD a release"]
    return [
        f"it costs {cost.usd:,.2f} USD, {cost.usd - budget:,.2f} USD above the budget of {budget:,.2f} USD a release"
    ]


def utc_now() -> datetime:
    """Return the time."""
    return datetime.now(UTC)
