"""The sensor that adds new Census releases, and a schedule for deployments that prefer a calendar.

Both read the Census release directory and add the partition of a release once. Adding a partition costs nothing; the
asset `approval` decides about spending.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Literal, cast

import dagster as dg

from census_tf_dagster.config.cost import utc_now
from census_tf_dagster.errors import DirectoryError, UserError
from census_tf_dagster.orchestration.metadata import titled, values_of
from census_tf_dagster.orchestration.partitions import RELEASES
from census_tf_dagster.orchestration.resources import CensusResource

if TYPE_CHECKING:
    from census_tf_dagster.census.directory import Directory, ListedRelease

SEEN = "census_release_seen"
"""Dynamic partitions that belong to no asset. They record which releases were added or skipped, and which retractions
were reported. They are in Dagster's database, so a release that a person removed is not added again after a restart."""

RELEASES_NAME = str(RELEASES.name)
EVERY_SECONDS = 3600
PLANS_LOOKED_AT = 20
"""How many of the last plans of a set are read to predict a finish time."""
DAILY = "0 6 * * *"
"""Every day at 6."""

Kinds = Literal["lts", "weekly"]


class NoDirectoryError(UserError):
    """The Census is the deployment's own, so it is not in the release directory."""


@dataclass(frozen=True)
class Assessment:
    """The decision about the releases in the directory.

    Attributes
    ----------
    add
        The release whose partition should be added; None: no release is new.
    skipped
        Older releases that are also new. They are named once and never added automatically.
    retracted
        Releases that were added before and are now retracted, each with the reason.
    notes
        Lines for a person to read.
    """

    add: str | None
    skipped: tuple[str, ...]
    retracted: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def read_kinds(value: str) -> Kinds:
    """Return which releases are added automatically.

    Raises
    ------
    UserError
        When `value` is neither ``lts`` nor ``weekly``.
    """
    if value not in ("lts", "weekly"):
        raise UserError(
            f"CENSUS_TF_RELEASES is {value!r}; expected lts, or weekly (which includes the lts releases). Set one."
        )
    return cast("Kinds", value)


def assess_releases(
    directory: "Directory", kinds: Kinds, *, there: Sequence[str], seen: Sequence[str], finish: datetime | None
) -> Assessment:
    """Decide which release of a directory to add, and what to report.

    Parameters
    ----------
    directory
        The releases that the directory lists.
    kinds
        ``lts``: long-term releases; ``weekly``: those and the weekly ones.
    there
        Releases that are partitions.
    seen
        Releases that were added or skipped before.
    finish
        When work on a new release would end, predicted from the last plans; None when there is no plan yet.
    """
    notes = [f"malformed entry: {text}" for text in directory.malformed]
    retracted = tuple(
        (one.name, str(one.retraction)) for one in directory.releases if one.retraction and one.name in there
    )
    notes += [f"WARNING: the added release {name} was {why}" for name, why in retracted]
    known = {*there, *seen}
    new: list[ListedRelease] = []
    skipped: list[str] = []
    for one in directory.releases:
        if one.name in known or (kinds == "lts" and not one.long_term):
            continue
        against = one.objections(finish or utc_now())
        if against:
            notes.append(f"WARNING: release {one.name} ({one.kind}) is not added: {'; '.join(against)}")
        elif new or any(other.built > one.built for other in directory.releases if _outranks(other, one, known)):
            skipped.append(one.name)
        else:
            new.append(one)
    if new:
        notes.insert(0, f"release {new[0].name} ({new[0].kind}, built {new[0].built}) is new and was added")
    if skipped:
        notes.insert(0, f"older releases, not added automatically (use `release add NAME`): {', '.join(skipped)}")
    return Assessment(new[0].name if new else None, tuple(skipped), retracted, tuple(notes))


def _outranks(other: "ListedRelease", one: "ListedRelease", known: set[str]) -> bool:
    """Tell whether `other` is known and keeps `one` from being added. A weekly release outranks only weekly ones."""
    return other.name in known and (other.long_term or not one.long_term)


def predicted_finish(instance: dg.DagsterInstance, plans: Sequence[dg.AssetKey]) -> datetime | None:
    """Return when the slowest set would finish a release that starts now; None when no set has a plan.

    The duration is the longest that the plans of each set's last planned release gave, because later plans find cells
    that are already done.
    """
    days: list[float] = []
    for key in plans:
        records = instance.fetch_materializations(key, limit=PLANS_LOOKED_AT).records
        events = [event for record in records if (event := record.asset_materialization)]
        values = [
            values_of(event.metadata)["days_with_the_fleet"]
            for event in events
            if event.partition == events[0].partition
        ]
        days += [value for value in values if isinstance(value, float)]
    return utc_now() + timedelta(days=max(days)) if days else None


def read_releases(
    instance: dg.DagsterInstance, census: CensusResource, kinds: Kinds, plans: Sequence[dg.AssetKey]
) -> Assessment:
    """Read the directory once, decide, and record the releases that were seen.

    A release to add is recorded at the next call, when its partition exists. So nothing is lost if this call is
    interrupted.

    Raises
    ------
    NoDirectoryError
        When the Census is the deployment's own.
    DirectoryError
        When the directory does not answer, or its answer is not a directory.
    """
    from census_tf_dagster.census.directory import read_directory

    if not census.is_public:
        raise NoDirectoryError(
            f"the releases of {census.location} are in no directory. Add each with `census-tf-dagster release add "
            "NAME`. (For the public CELLxGENE Census, set CENSUS_TF_CENSUS to `public`.)"
        )
    directory = read_directory(census.directory)
    there = instance.get_dynamic_partitions(RELEASES_NAME)
    seen = instance.get_dynamic_partitions(SEEN)
    found = assess_releases(directory, kinds, there=there, seen=seen, finish=predicted_finish(instance, plans))
    reported = [_retraction_mark(name) for name, _ in found.retracted]
    news = tuple((name, why) for name, why in found.retracted if _retraction_mark(name) not in seen)
    instance.add_dynamic_partitions(SEEN, [*there, *found.skipped, *reported])
    return replace(found, retracted=news)


def _retraction_mark(name: str) -> str:
    """Return the partition that records a retraction as reported."""
    return f"{name} retracted"


def build_release_watch(kinds: Kinds, plans: Sequence[dg.AssetKey]) -> dg.Definitions:
    """Build the sensor, and the schedule with its job.

    Parameters
    ----------
    kinds
        Which releases are added automatically.
    plans
        The plan assets of all sets.
    """
    what = "long-term releases" if kinds == "lts" else "long-term and weekly releases"

    def observations(found: Assessment) -> list[dg.AssetObservation]:
        return [
            dg.AssetObservation(
                key, partition=name, description=f"WARNING: the release was {why}", metadata=titled({"retracted": why})
            )
            for name, why in found.retracted
            for key in plans
        ]

    @dg.sensor(
        name="census_releases",
        minimum_interval_seconds=EVERY_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=f"Reads the Census release directory and adds the partition of each new release once: {what}.",
    )
    def census_releases(context: dg.SensorEvaluationContext, census: CensusResource) -> dg.SensorResult:
        try:
            found = read_releases(context.instance, census, kinds, plans)
        except (DirectoryError, NoDirectoryError) as error:
            return dg.SensorResult(skip_reason=str(error))
        for note in found.notes:
            (context.log.warning if note.startswith("WARNING") else context.log.info)(note)
        return dg.SensorResult(
            skip_reason="; ".join(found.notes) or "nothing new",
            dynamic_partitions_requests=[RELEASES.build_add_request([found.add])] if found.add else [],
            asset_events=observations(found),
        )

    @dg.op(description=f"Reads the Census release directory and adds the partition of each new release once: {what}.")
    def look_for_releases(context: dg.OpExecutionContext, census: CensusResource) -> None:
        found = read_releases(context.instance, census, kinds, plans)
        for note in found.notes or ("nothing new",):
            (context.log.warning if note.startswith("WARNING") else context.log.info)(note)
        if found.add:
            context.instance.add_dynamic_partitions(RELEASES_NAME, [found.add])
        for observation in observations(found):
            context.log_event(observation)

    @dg.job(name="look_for_census_releases", description="Does the work of the sensor census_releases as a run.")
    def look_for_census_releases() -> None:
        look_for_releases()

    schedule = dg.ScheduleDefinition(
        name="census_releases_daily",
        job=look_for_census_releases,
        cron_schedule=DAILY,
        description="If you prefer a calendar, switch this schedule on and the sensor census_releases off.",
    )
    return dg.Definitions(sensors=[census_releases], jobs=[look_for_census_releases], schedules=[schedule])
