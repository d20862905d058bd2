"""Watching the Census release directory: a sensor, and a schedule for those who prefer a calendar.

Both look in the same way and add the partition of a release once. Adding costs nothing: what may be spent on it is the
gate's matter (`orchestration/assets/approval.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Literal, cast

import dagster as dg

from census_tf_dagster.config.cost import utc_now
from census_tf_dagster.errors import DirectoryError, UserError
from census_tf_dagster.orchestration.partitions import RELEASES
from census_tf_dagster.orchestration.resources import CensusResource

if TYPE_CHECKING:
    from census_tf_dagster.census.directory import Directory, ListedRelease

SEEN = "census_release_seen"
"""Dynamic partitions of no asset: releases that were added or passed over, and retractions that were told. Kept in
Dagster's database, so a release that somebody removed again stays away, restarts or not."""

RELEASES_NAME = str(RELEASES.name)
EVERY_SECONDS = 3600
PLANS_LOOKED_AT = 20
DAILY = "0 6 * * *"

Kinds = Literal["lts", "weekly"]


class NoDirectoryError(UserError):
    """A deployment's own Census has no directory to look at."""


@dataclass(frozen=True)
class Look:
    """What a look at the directory found.

    Attributes
    ----------
    add
        The release whose partition is to be added, if any.
    passed
        Older releases that are new as well: named once, never added by themselves.
    retracted
        Releases that were added once and are retracted now, and why.
    notes
        What a person should read, of all that was found.
    """

    add: str | None
    passed: tuple[str, ...]
    retracted: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def read_kinds(value: str) -> Kinds:
    """Check which releases are added by themselves.

    Raises
    ------
    UserError
        When `value` is neither ``lts`` nor ``weekly``.
    """
    if value not in ("lts", "weekly"):
        raise UserError(f"CENSUS_TF_RELEASES is {value!r}; expected lts, or weekly (which has the long-term ones too).")
    return cast("Kinds", value)


def judge(
    directory: "Directory", kinds: Kinds, *, there: Sequence[str], seen: Sequence[str], finish: datetime | None
) -> Look:
    """Decide what to do about a directory.

    Parameters
    ----------
    directory
        What it lists.
    kinds
        ``lts``: long-term releases; ``weekly``: those and the weekly ones.
    there
        Releases that are partitions.
    seen
        Those that were added or passed over before.
    finish
        When work on a new release would end, judged by the last plans; None when there is no plan yet.
    """
    notes = [f"malformed entry: {text}" for text in directory.malformed]
    retracted = tuple(
        (one.name, str(one.retraction)) for one in directory.releases if one.retraction and one.name in there
    )
    notes += [f"WARNING: release {name}, which was added, was {why}" for name, why in retracted]
    known = {*there, *seen}
    new: list[ListedRelease] = []
    passed: list[str] = []
    for one in directory.releases:
        if one.name in known or (kinds == "lts" and not one.long_term):
            continue
        against = one.objections(finish or utc_now())
        if against:
            notes.append(f"WARNING: release {one.name} ({one.kind}) is not added: {'; '.join(against)}")
        elif new or any(other.built > one.built for other in directory.releases if _outranks(other, one, known)):
            passed.append(one.name)
        else:
            new.append(one)
    if new:
        notes.insert(0, f"release {new[0].name} ({new[0].kind}, built {new[0].built}) is new and added")
    if passed:
        notes.insert(0, f"older, and not added by themselves (`release add NAME` does it): {', '.join(passed)}")
    return Look(new[0].name if new else None, tuple(passed), retracted, tuple(notes))


def _outranks(other: "ListedRelease", one: "ListedRelease", known: set[str]) -> bool:
    """Tell whether a known release stands in the way of an older one; a weekly one in that of weekly ones only."""
    return other.name in known and (other.long_term or not one.long_term)


def predicted_finish(instance: dg.DagsterInstance, plans: Sequence[dg.AssetKey]) -> datetime | None:
    """Return when the slowest set would be done with a release that starts now.

    Each set's last planned release says how long that takes: by its first plan, as a later one finds cells done.
    """
    days: list[float] = []
    for key in plans:
        records = instance.fetch_materializations(key, limit=PLANS_LOOKED_AT).records
        events = [event for record in records if (event := record.asset_materialization)]
        values = [
            event.metadata["days_with_the_fleet"].value for event in events if event.partition == events[0].partition
        ]
        days += [value for value in values if isinstance(value, float)]
    return utc_now() + timedelta(days=max(days)) if days else None


def look(instance: dg.DagsterInstance, census: CensusResource, kinds: Kinds, plans: Sequence[dg.AssetKey]) -> Look:
    """Look at the directory once, and remember what was seen.

    What is to be added is remembered by the next look, when it is there: so nothing is lost when this one breaks off.

    Raises
    ------
    NoDirectoryError
        When the Census is a deployment's own, of which no directory tells.
    DirectoryError
        When the directory does not answer, or not as a directory does.
    """
    from census_tf_dagster.census.directory import read_directory

    if not census.is_public:
        raise NoDirectoryError(
            f"the releases of {census.location} stand in no directory: add one with `release add NAME`. "
            "(CENSUS_TF_CENSUS is `public` where those of the CELLxGENE Census are meant.)"
        )
    directory = read_directory(census.directory)
    there = instance.get_dynamic_partitions(RELEASES_NAME)
    seen = instance.get_dynamic_partitions(SEEN)
    found = judge(directory, kinds, there=there, seen=seen, finish=predicted_finish(instance, plans))
    told = [_told(name) for name, _ in found.retracted]
    news = tuple((name, why) for name, why in found.retracted if _told(name) not in seen)
    instance.add_dynamic_partitions(SEEN, [*there, *found.passed, *told])
    return replace(found, retracted=news)


def _told(name: str) -> str:
    return f"{name} retracted"


def build_release_watch(kinds: Kinds, plans: Sequence[dg.AssetKey]) -> dg.Definitions:
    """Build the sensor, and the job that the schedule runs.

    Parameters
    ----------
    kinds
        Which releases are added.
    plans
        The plan assets of all sets.
    """
    what = "long-term releases" if kinds == "lts" else "long-term and weekly releases"

    def observations(found: Look) -> list[dg.AssetObservation]:
        return [
            dg.AssetObservation(
                key, partition=name, description=f"WARNING: the release was {why}", metadata={"retracted": why}
            )
            for name, why in found.retracted
            for key in plans
        ]

    @dg.sensor(
        name="census_releases",
        minimum_interval_seconds=EVERY_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=f"Looks at the Census release directory and adds the partition of what is new, once: {what}.",
    )
    def census_releases(context: dg.SensorEvaluationContext, census: CensusResource) -> dg.SensorResult:
        try:
            found = look(context.instance, census, kinds, plans)
        except (DirectoryError, NoDirectoryError) as error:
            return dg.SensorResult(skip_reason=str(error))
        for note in found.notes:
            (context.log.warning if note.startswith("WARNING") else context.log.info)(note)
        return dg.SensorResult(
            skip_reason="; ".join(found.notes) or "nothing new",
            dynamic_partitions_requests=[RELEASES.build_add_request([found.add])] if found.add else [],
            asset_events=observations(found),
        )

    @dg.op(description=f"Looks at the Census release directory and adds the partition of what is new, once: {what}.")
    def look_for_releases(context: dg.OpExecutionContext, census: CensusResource) -> None:
        found = look(context.instance, census, kinds, plans)
        for note in found.notes or ("nothing new",):
            (context.log.warning if note.startswith("WARNING") else context.log.info)(note)
        if found.add:
            context.instance.add_dynamic_partitions(RELEASES_NAME, [found.add])
        for observation in observations(found):
            context.log_event(observation)

    @dg.job(name="look_for_census_releases", description="What the sensor census_releases does, as a run.")
    def look_for_census_releases() -> None:
        look_for_releases()

    schedule = dg.ScheduleDefinition(
        name="census_releases_daily",
        job=look_for_census_releases,
        cron_schedule=DAILY,
        description="For those who prefer a calendar: switch it on here, and the sensor census_releases off.",
    )
    return dg.Definitions(sensors=[census_releases], jobs=[look_for_census_releases], schedules=[schedule])
