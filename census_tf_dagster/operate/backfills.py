"""Asset backfills of one release of a set: start one, find the one that goes on, ask how it is."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from census_tf_dagster.config.dagster_names import APPROVAL, ARRAY, LAUNCH_TAG, PLAN, RECOMPUTE_TAG, REUSED, SHARDS
from census_tf_dagster.operate.graphql import Deployment, expect
from census_tf_dagster.operate.remote_set import RemoteSet
from census_tf_dagster.operate.shard_ranges import compact, ranges

GOING_ON = ("REQUESTED", "CANCELING", "FAILING")
SUCCEEDED = ("COMPLETED_SUCCESS", "COMPLETED")

# Dagster raises when it is asked for the targets of an asset that a backfill does not have, so this does not ask.
GOING = """query Going($statuses: [BulkActionStatus!]) {
  partitionBackfillsOrError(filters: {statuses: $statuses}) {
    __typename
    ... on Error { message }
    ... on PartitionBackfills { results { id status tags { key value } } }
  }
}"""

ONE = """query One($shards: AssetKeyInput!, $id: String!) {
  partitionBackfillOrError(backfillId: $id) {
    __typename
    ... on Error { message }
    ... on PartitionBackfill {
      id status timestamp
      error { message }
      tags { key value }
      assetSelection { path }
      partitionsTargetedForAssetKey(assetKey: $shards) { partitionKeys }
    }
  }
}"""

LAUNCH = """mutation Launch($params: LaunchBackfillParams!) {
  launchPartitionBackfill(backfillParams: $params) {
    __typename
    ... on Error { message }
    ... on LaunchBackfillSuccess { backfillId }
  }
}"""

CANCEL = """mutation Cancel($id: String!) {
  cancelPartitionBackfill(backfillId: $id) {
    __typename
    ... on Error { message }
  }
}"""


@dataclass(frozen=True)
class LaunchScope:
    """What a backfill does for a release."""

    plan: bool
    """The plan, and its approval: who launches has approved."""
    shards: tuple[int, ...]
    array: bool
    recompute: bool
    reused: bool = False
    """Whether the shards' reused cells are copied, too."""

    def covers(self, other: "LaunchScope") -> bool:
        """Tell whether who waits for this has what `other` asks for."""
        return (
            (self.plan or not other.plan)
            and (self.array or not other.array)
            and (self.recompute or not other.recompute)
            and (self.reused or not other.reused)
            and set(self.shards) >= set(other.shards)
        )

    def __str__(self) -> str:
        parts = ["the plan"] if self.plan else []
        copies = " with their copies" if self.reused else ""
        parts.append(f"shards {compact(self.shards)}{copies}" + (" (recompute)" if self.recompute else ""))
        return ", ".join([*parts, *(["the array"] if self.array else [])])


@dataclass(frozen=True)
class Backfill:
    """A backfill as the deployment has it."""

    id: str
    status: str
    created: float
    """Seconds since 1970."""
    error: str | None
    work: LaunchScope

    @property
    def going_on(self) -> bool:
        """Whether it has not ended."""
        return self.status in GOING_ON


def start(deployment: Deployment, of: RemoteSet, release: str, work: LaunchScope) -> str:
    """Start a backfill; return its id. Dagster runs plan, approval, shards and array in this order, once each.

    Raises
    ------
    UserError
        With Dagster's message when it refuses.
    """
    shards = [(of.partition(release, a), of.partition(release, b)) for a, b in ranges(work.shards)]
    targets = [(asset, shards) for asset in (SHARDS, *([REUSED] if work.reused else []))]
    wanted_too = ((PLAN, work.plan), (APPROVAL, work.plan), (ARRAY, work.array))
    targets += [(asset, [(release, release)]) for asset, wanted in wanted_too if wanted]
    tags = {LAUNCH_TAG: f"{of.name}/{release}"}
    params: dict[str, object] = {
        "title": f"launch {of.name} {release}",
        "partitionsByAssets": [
            {"assetKey": of.key(asset), "partitions": {"ranges": [{"start": a, "end": b} for a, b in keys]}}
            for asset, keys in targets
        ],
    }
    if work.recompute:
        tags[RECOMPUTE_TAG] = "true"
        # Every run of the backfill gets it; Dagster ignores the configuration of an op that a run does not have.
        ops = {f"{of.name}__{asset}": {"config": {"recompute": True}} for asset, keys in targets if keys is shards}
        params["runConfigData"] = json.dumps({"ops": ops})
    params["tags"] = [{"key": key, "value": value} for key, value in tags.items()]
    answer = deployment.ask(LAUNCH, params=params)["launchPartitionBackfill"]
    return str(expect(answer, "LaunchBackfillSuccess", f"launch of {of.name} {release}")["backfillId"])


def cancel(deployment: Deployment, backfill_id: str) -> None:
    """Ask Dagster to end a backfill and its runs; the daemon does so at its next look."""
    answer = deployment.ask(CANCEL, id=backfill_id)["cancelPartitionBackfill"]
    expect(answer, "CancelBackfillSuccess", f"cancelling backfill {backfill_id}")


def find_running(deployment: Deployment, of: RemoteSet, release: str) -> Backfill | None:
    """Return the first backfill that was launched for a release and has not ended.

    One that is being cancelled or fails is returned only when no other goes on.
    """
    answer = deployment.ask(GOING, statuses=GOING_ON)["partitionBackfillsOrError"]
    mine = [
        one
        for one in expect(answer, "PartitionBackfills", "backfills")["results"]
        if {"key": LAUNCH_TAG, "value": f"{of.name}/{release}"} in one["tags"]
    ]
    if not mine:
        return None
    # Dagster answers the last stored first. Timestamps are taken well before storing, so they tell no order.
    first = min(reversed(mine), key=lambda one: one["status"] != "REQUESTED")
    return fetch(deployment, of, release, first["id"])


def fetch(deployment: Deployment, of: RemoteSet, release: str, backfill_id: str) -> Backfill:
    """Return a backfill by id.

    Raises
    ------
    UserError
        When the deployment does not have it any more.
    """
    answer = deployment.ask(ONE, shards=of.key(SHARDS), id=backfill_id)["partitionBackfillOrError"]
    return _backfill(expect(answer, "PartitionBackfill", f"backfill {backfill_id}"), release)


def _backfill(one: Mapping[str, Any], release: str) -> Backfill:
    targeted = one["partitionsTargetedForAssetKey"] or {}
    prefix = f"{release}|"
    shards = {int(key.removeprefix(prefix)) for key in targeted.get("partitionKeys") or () if key.startswith(prefix)}
    assets = {key["path"][-1] for key in one["assetSelection"] or ()}
    return Backfill(
        id=one["id"],
        status=one["status"],
        created=one["timestamp"],
        error=one["error"] and one["error"]["message"].strip(),
        work=LaunchScope(
            plan=PLAN in assets,
            shards=tuple(sorted(shards)),
            array=ARRAY in assets,
            reused=REUSED in assets,
            recompute={"key": RECOMPUTE_TAG, "value": "true"} in one["tags"],
        ),
    )
