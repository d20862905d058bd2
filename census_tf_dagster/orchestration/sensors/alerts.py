"""The sensor `alerts`: it sends a message when a shard or file failed for good, one waits, or GPUs wait for the CPU.

Each failed run and each request for an approval is told once; waiting GPUs once for each set and release or file.
Nothing that happened before the sensor's first evaluation is told. A message that is not delivered is sent again at the
next evaluation; the sensor itself never fails because of it.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

import dagster as dg

from census_tf_dagster.config.dagster_names import ALERTED_TAG, ALERTS, APPROVAL, ARRAY, WILL_RETRY_TAG
from census_tf_dagster.io.alert_channel import AlertError, send
from census_tf_dagster.orchestration.metadata import values_of

EVERY_SECONDS = 60
IDLE = 0.5
"""The share of its time that a GPU may wait by default."""
LOOK_BACK_SECONDS = 86400.0
"""A failure that could not be told for so long is not told any more."""
MOST_MESSAGES = 5
"""The most messages of one evaluation, which Dagster ends after a minute. The others follow at the next one."""
PAGE = 1000
LEAST_SECONDS = 300.0
"""A shard that worked for less says nothing about a GPU: at its start, the GPU always waits for the first cells."""
NAMED = 20
"""The most shards that a message names."""
LONGEST_REASON = 500
"""Characters of a failure's reason in a message."""


@dataclass
class _Told:
    """The sensor's cursor.

    Attributes
    ----------
    since
        When the sensor was first evaluated, in seconds since 1970.
    after
        The number of the last event in Dagster's event log that was looked at.
    idle
        Sets and releases whose waiting GPUs were told, as ``set release``.
    """

    since: float
    after: int
    idle: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, cursor: str | None, instance: dg.DagsterInstance) -> "_Told":
        """Read the cursor. If there is none, or a person has put another there, all until now counts as told."""
        try:
            return cls(**json.loads(cursor or ""))
        except (ValueError, TypeError):
            return cls(time.time(), instance.event_log_storage.get_maximum_record_id() or 0)


Sets = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class _Message:
    subject: str
    text: str


def build_alerts(channel: str, idle: float, sets: Sets) -> dg.Definitions:
    """Build the sensor `alerts`; without a channel there is none.

    Parameters
    ----------
    channel
        As in `alert_channel.send`; empty: no alerts.
    idle
        The share of its time, between 0 and 1, that a shard's GPUs may wait before it is told.
    sets
        By the name of each set, the assets whose failure is told. The last one computes embeddings.
    """
    if not channel:
        return dg.Definitions()

    @dg.sensor(
        name=ALERTS,
        minimum_interval_seconds=EVERY_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Sends a message when shards or files failed for good, one waits for an approval, or GPUs wait.",
    )
    def alerts(context: dg.SensorEvaluationContext) -> dg.SkipReason:
        told = _Told.read(context.cursor, context.instance)
        lines: list[str] = []
        try:
            for subject in _tell(context.instance, told, channel, idle, sets):
                lines.append(f"told: {subject}")
                if len(lines) == MOST_MESSAGES:
                    break
        except AlertError as error:
            lines.append(f"not delivered, and tried again in {EVERY_SECONDS} s: {error}")
            context.log.warning(lines[-1])
        context.update_cursor(json.dumps(asdict(told)))
        return dg.SkipReason("; ".join(lines) or "nothing to tell")

    return dg.Definitions(sensors=[alerts])


def _tell(instance: dg.DagsterInstance, told: _Told, channel: str, idle: float, sets: Sets) -> Iterator[str]:
    """Send the messages one by one. Each is noted as told before its subject is yielded."""
    for (name, release), runs in _failed_for_good(instance, told.since, sets).items():
        message = _failure(instance, name, release, runs)
        send(channel, message.subject, message.text)
        for run in runs:
            instance.add_run_tags(run.run_id, {ALERTED_TAG: "true"})
        yield message.subject
    for record in _events(instance, told.after, sets):
        found, work = _waits(record), None
        if found is None and (work := _work(record)) not in told.idle:
            found = _idle(record, idle)
        if found is not None:
            send(channel, found.subject, found.text)
            told.idle += [work] if work else []
        told.after = record.storage_id
        if found is not None:
            yield found.subject


def _failed_for_good(
    instance: dg.DagsterInstance, since: float, sets: Sets
) -> dict[tuple[str, str], list[dg.DagsterRun]]:
    """Return the failed runs that will not be retried and were not told, by set and release or file."""
    begin = max(since, time.time() - LOOK_BACK_SECONDS)
    wanted = dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE], updated_after=datetime.fromtimestamp(begin, UTC))
    found: dict[tuple[str, str], list[dg.DagsterRun]] = {}
    for record in instance.get_run_records(wanted, ascending=True):
        run = record.dagster_run
        # Dagster decides about the retry just after the failure. Until then the tag is missing.
        open_yet = instance.run_retries_enabled and run.tags.get(WILL_RETRY_TAG) != "false"
        if open_yet or ALERTED_TAG in run.tags:
            continue
        for name, assets in sets.items():
            if any(dg.AssetKey([name, asset]) in (run.asset_selection or ()) for asset in assets):
                found.setdefault((name, _partition(run)[0]), []).append(run)
    return found


def _partition(run: dg.DagsterRun) -> tuple[str, str]:
    """Return the release and the shard of a run; the file and nothing for a set of files."""
    release, _, shard = run.tags.get("dagster/partition", "").partition("|")
    return release, shard


def _failure(instance: dg.DagsterInstance, name: str, release: str, runs: Sequence[dg.DagsterRun]) -> _Message:
    shards = [shard for run in runs if (shard := _partition(run)[1])]
    last = f"(run {runs[-1].run_id}): {_reason(instance, runs[-1].run_id)}"
    if not shards:
        return _Message(
            f"{name} {release} failed",
            f"Not retried any more. Committed cells stay.\nThe last failure {last}\nFix the cause, then materialize "
            f"{name}/{ARRAY} of this file again, with its plan if the file has changed.",
        )
    named = ", ".join(shards[:NAMED]) + (f" and {len(shards) - NAMED} more" if len(shards) > NAMED else "")
    count = "1 shard" if len(shards) == 1 else f"{len(shards)} shards"
    return _Message(
        f"{count} of {name} {release} failed",
        f"Not retried any more: {named}. Committed cells stay.\n"
        f"The last failure {last}\n"
        f"Fix the cause, then run `census-tf-dagster launch {name} {release}`.",
    )


def _reason(instance: dg.DagsterInstance, run_id: str) -> str:
    """Return why a run failed: what the asset raised, or else what Dagster says."""
    said = "unknown"
    for entry in instance.all_logs(run_id, of_type={dg.DagsterEventType.STEP_FAILURE, dg.DagsterEventType.RUN_FAILURE}):
        event = entry.get_dagster_event()
        if event.event_type == dg.DagsterEventType.RUN_FAILURE:
            said = (event.message or said) if said == "unknown" else said
            continue
        data = event.step_failure_data
        if data.user_failure_data is not None and data.user_failure_data.description:
            said = data.user_failure_data.description
        elif data.error is not None:
            said = (data.error.cause or data.error).message
    said = said.strip()
    return said if len(said) <= LONGEST_REASON else f"{said[:LONGEST_REASON]}..."


def _events(instance: dg.DagsterInstance, after: int, sets: Sets) -> list[dg.EventLogRecord]:
    """Return the observations of approvals and the materializations of embeddings after an event, oldest first."""
    pages: list[Sequence[dg.EventLogRecord]] = []
    for name, assets in sets.items():
        for fetch, asset in ((instance.fetch_observations, APPROVAL), (instance.fetch_materializations, assets[-1])):
            wanted = dg.AssetRecordsFilter(asset_key=dg.AssetKey([name, asset]), after_storage_id=after)
            pages.append(fetch(wanted, limit=PAGE, ascending=True).records)
    # After a full page come events that may be older than those of other pages.
    last = min((page[-1].storage_id for page in pages if len(page) == PAGE), default=None)
    found = [record for page in pages for record in page if last is None or record.storage_id <= last]
    return sorted(found, key=lambda record: record.storage_id)


def _waits(record: dg.EventLogRecord) -> _Message | None:
    """Return the message about a release that waits for an approval."""
    event = record.asset_observation
    question = values_of(event.metadata).get("waits_for_approval") if event else None
    if event is None or question is None:
        return None
    return _Message(f"{event.asset_key.path[0]} {event.partition} waits for your approval", str(question))


def _work(record: dg.EventLogRecord) -> str | None:
    """Return the set and release of a materialized shard, or the set and file."""
    event = record.asset_materialization
    return f"{event.asset_key.path[0]} {(event.partition or '').partition('|')[0]}" if event else None


def _idle(record: dg.EventLogRecord, bound: float) -> _Message | None:
    """Return the message about a shard whose GPUs waited too long."""
    event = record.asset_materialization
    figures = values_of(event.metadata) if event else {}
    busy, waiting = (float(figures.get(f"seconds_{what}_compute", 0.0)) for what in ("busy", "waiting"))
    if event is None or busy + waiting < LEAST_SECONDS or waiting / (busy + waiting) <= bound:
        return None
    what, _, shard = (event.partition or "").partition("|")
    return _Message(
        f"GPUs of {_work(record)} wait {waiting / (busy + waiting):.0%} of their time",
        f"{f'Shard {shard}' if shard else what} on {figures.get('devices', 'unknown devices')}: in "
        f"{busy + waiting:,.0f} s, the GPUs computed for {busy:,.0f} s and waited for {waiting:,.0f} s. More than "
        f"{bound:.0%} is told. The stage `{figures.get('limited_by', 'unknown')}` sets the pace: give each GPU more "
        "CPU cores, or use nodes in the data's region. Other shards of this release are not told.",
    )
