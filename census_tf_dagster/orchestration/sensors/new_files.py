"""The sensor that adds a partition for each file of a set of files, and starts new and changed ones if it may.

A file is new when it looks the same at two looks, so that one that is still being copied is left alone. The cursor
keeps which version of each file was seen, and which was added.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import dagster as dg

from census_tf_dagster.config.dagster_names import PLAN
from census_tf_dagster.config.settings import FileSetSettings
from census_tf_dagster.errors import StoreError, UserError
from census_tf_dagster.io.names import NAME
from census_tf_dagster.orchestration.asset_support import asset_key
from census_tf_dagster.orchestration.partitions import file_partitions
from census_tf_dagster.orchestration.resources import StoreResource

EVERY_SECONDS = 60
MOST_ADDED = 200
"""Files that one look adds at most; the next look adds the others."""
NAMED = 5


@dataclass(frozen=True)
class Look:
    """What a look at the files has found.

    Attributes
    ----------
    add
        Files whose partition is to be added or, if it is there already, whose content has changed, with the version.
    cursor
        For the next look: by name, the version that was seen, and the one that was added.
    notes
        Lines for a person to read.
    """

    add: dict[str, str]
    cursor: dict[str, dict[str, str]]
    notes: tuple[str, ...]


def look_at_files(versions: Mapping[str, str], before: Mapping[str, Mapping[str, str]]) -> Look:
    """Decide which files are new or have changed.

    Parameters
    ----------
    versions
        The version of each file that is there.
    before
        The cursor of the last look.
    """
    add: dict[str, str] = {}
    cursor: dict[str, dict[str, str]] = {}
    coming: list[str] = []
    notes: list[str] = []
    if odd := [repr(name) for name in versions if not NAME.fullmatch(name)]:
        notes.append(
            f"{len(odd)} files are not embedded, because of their names (expected up to 100 letters, digits, '_', '-' "
            f"and '.'; rename them): {_some(odd)}"
        )
    for name, version in versions.items():
        if not NAME.fullmatch(name):
            continue
        seen, added = before.get(name, {}).get("seen"), before.get(name, {}).get("added", "")
        if version not in (seen, added):
            coming.append(name)
        elif version != added and len(add) < MOST_ADDED:
            add[name] = added = version
        cursor[name] = {"seen": version, "added": added}
    if coming:
        notes.append(f"{len(coming)} files are new or still being written; the next look decides: {_some(coming)}")
    if add:
        notes.insert(0, f"{len(add)} files are new or have changed: {_some(list(add))}")
    if gone := [name for name in before if name not in versions]:
        notes.append(f"{len(gone)} files are gone; their partitions and arrays stay: {_some(gone)}")
    return Look(add, cursor, tuple(notes))


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def build_new_files(settings: FileSetSettings) -> dg.SensorDefinition:
    """Build the sensor of a set of files."""
    partitions = file_partitions(settings)
    plan = asset_key(settings, PLAN)
    starts = settings.spending.auto_start

    @dg.sensor(
        name=f"{settings.name}_new_files",
        minimum_interval_seconds=EVERY_SECONDS,
        default_status=dg.DefaultSensorStatus.RUNNING,
        asset_selection=dg.AssetSelection.assets(plan),
        description=f"Adds a partition for each file below {settings.files}"
        f"{', and plans it' if starts else '; a person starts it'}.",
    )
    def new_files(context: dg.SensorEvaluationContext, store: StoreResource) -> dg.SensorResult:
        from census_tf_dagster.own_cells.listing import list_files

        try:
            versions = list_files(settings.files, store.storage())
        except (UserError, StoreError) as error:
            return dg.SensorResult(skip_reason=str(error))
        found = look_at_files(versions, _read(context.cursor))
        for note in found.notes:
            context.log.info(note)
        requests: list[dg.RunRequest] = []
        if starts:
            requests = [
                dg.RunRequest(run_key=f"{name} {version}", partition_key=name) for name, version in found.add.items()
            ]
        elif found.add:
            context.log.info(f"auto_start is off: materialize group:{settings.name} of these files to embed them")
        there = set(context.instance.get_dynamic_partitions(str(partitions.name)))
        new = [name for name in found.add if name not in there]
        return dg.SensorResult(
            run_requests=requests,
            skip_reason=None if requests else "; ".join(found.notes) or "nothing new",
            dynamic_partitions_requests=[partitions.build_add_request(new)] if new else [],
            cursor=json.dumps(found.cursor),
        )

    return new_files


def _read(cursor: str | None) -> Mapping[str, Any]:
    try:
        found = json.loads(cursor or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
