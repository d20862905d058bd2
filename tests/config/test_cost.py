"""The cost of work, the choice of a rate, and when a person's approval is needed."""

from datetime import UTC, datetime

import pytest
import yaml

from census_tf_dagster.config.cost import (
    ASSUMED_SHARE,
    FLOP_PER_TOKEN,
    Rate,
    Spending,
    Throughput,
    choose_rate,
    cost_of,
    objections,
)
from census_tf_dagster.config.placement import Placement
from census_tf_dagster.embedding_set import EmbeddingSet
from census_tf_dagster.errors import UserError
from tests.support.project import Project

L40S = Throughput(tokens=9e6, seconds=100, devices=1, device="NVIDIA L40S")
NOW = datetime(2025, 11, 8, 12, tzinfo=UTC)


def test_shards_count_before_the_canary_and_that_before_an_assumption() -> None:
    canary = Throughput(tokens=4e6, seconds=100, devices=1, device="NVIDIA L40S")
    four = Throughput(tokens=9e6, seconds=25, devices=4, device="NVIDIA L40S")
    rate = choose_rate([L40S, four], canary, "L40S")
    assert rate is not None
    assert (rate.tokens_per_second, rate.measured) == (90_000, True)
    assert rate.source == "measured: the last 2 shards of this set on NVIDIA L40S"
    rate = choose_rate([], canary, "L40S")
    assert rate is not None
    assert (rate.tokens_per_second, rate.measured) == (40_000, True)
    assert "canary" in rate.source
    rate = choose_rate([], None, "L40S")
    assert rate is not None
    assert not rate.measured
    assert rate.source.startswith("ASSUMED: 25% ")
    # The floor's 319 cells/s of 1,802 tokens on such a GPU (field notes), a quarter of it.
    assert rate.tokens_per_second == pytest.approx(319 * 1802 * ASSUMED_SHARE, rel=0.01)
    assert choose_rate([], None, None) is None


def test_what_another_gpu_has_done_does_not_count() -> None:
    for other in ("NVIDIA L4", "NVIDIA A100-SXM4-40GB", "CPU"):
        rate = choose_rate([Throughput(1e9, 1, 1, other)], Throughput(1e9, 1, 1, other), "L40S")
        assert rate is not None
        assert not rate.measured, other
    measured = choose_rate([Throughput(1e6, 1, 1, "NVIDIA A100-SXM4-40GB")], None, "A100")
    assert measured is not None
    assert measured.measured
    # Where nothing is declared, what ran is the fleet.
    assert choose_rate([Throughput(1e6, 1, 1, "CPU")], None, None) == Rate(
        1e6, "measured: the last 1 shards of this set on CPU", measured=True
    )


def test_a_cost_by_hand() -> None:
    rate = Rate(100_000, "", measured=True)
    spending = Spending(True, 500.0, "L40S", usd_per_gpu_hour=2.0, fleet_gpus=10)
    cost = cost_of(86_400_000_000, rate, spending)
    assert (cost.gpu_hours, cost.usd, cost.days) == (240.0, 480.0, 1.0)
    assert cost.finish(NOW) == datetime(2025, 11, 9, 12, tzinfo=UTC)
    assert not objections(cost, spending)
    dearer = cost_of(108_000_000_000, rate, spending)
    assert objections(dearer, spending) == ["it costs 600.00 USD, 100.00 USD above the budget of 500.00 USD a release"]
    assert pytest.approx(1.14e12) == FLOP_PER_TOKEN * 1802


def test_what_nobody_knows_is_asked_for() -> None:
    budget = Spending(True, 500.0, None, usd_per_gpu_hour=2.0)
    unknown = cost_of(1000, None, budget)
    assert (unknown.gpu_hours, unknown.usd, unknown.days) == (None, None, None)
    assert objections(unknown, budget) == ["the cost is unknown, and the budget is 500.00 USD a release"]
    assert not objections(unknown, Spending(True))
    assert objections(unknown, Spending()) == ["`auto_start` of this set is off"]
    # Nothing to compute costs nothing, whatever the rate.
    assert not objections(cost_of(0, None, budget), budget)


def test_figures_of_a_shard() -> None:
    figures = {"tokens_computed": 1000, "seconds_load": 10.0, "seconds_work": 85.0, "seconds_verification": 5.0}
    assert Throughput.of(figures) is None
    assert Throughput.of(figures | {"devices": "NVIDIA L40S, NVIDIA L40S"}) == Throughput(1000, 100, 2, "NVIDIA L40S")


def spending_of(project: Project, text: str, **attributes: object) -> Spending:
    """Return the spending rule of a set whose YAML was read by PyYAML."""
    project.add_set("one", organism="homo_sapiens", **attributes)
    path = project.folder / "sets" / "one" / "defs.yaml"
    document = yaml.safe_load(path.read_text().replace("attributes:\n", f"attributes:\n{text}", 1))
    return EmbeddingSet(**document["attributes"]).placed(Placement(usd_per_gpu_hour=3.0, fleet_gpus=8)).spending


@pytest.mark.parametrize(
    ("text", "auto_start", "budget"),
    [
        ("", False, None),
        ("  auto_start: off\n", False, None),
        ("  auto_start: 'off'\n", False, None),
        ("  auto_start: on\n", True, None),
        ("  auto_start: 'on'\n", True, None),
        ("  auto_start: {budget: 250}\n", True, 250.0),
    ],
)
def test_the_rule_of_a_set(project: Project, text: str, auto_start: bool, budget: float | None) -> None:
    found = spending_of(project, text)
    assert (found.auto_start, found.budget_usd) == (auto_start, budget)
    assert (found.usd_per_gpu_hour, found.fleet_gpus) == (3.0, 8)


def test_a_sets_own_price_replaces_the_deployments(project: Project) -> None:
    found = spending_of(project, "  placement: {usd_per_gpu_hour: 1.5, gpu_type: H100}\n")
    assert (found.usd_per_gpu_hour, found.fleet_gpus, found.gpu_type) == (1.5, 8, "H100")


def test_a_budget_needs_a_price() -> None:
    one = EmbeddingSet(name="one", organism="homo_sapiens", checkpoint="x", auto_start={"budget": 5.0})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="the price of a GPU hour is unknown; set usd_per_gpu_hour"):
        one.placed()
