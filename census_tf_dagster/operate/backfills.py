"""Starts, finds, reads and cancels the backfill of a release of a set. One backfill covers the assets of one launch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from census_tf_dagster.config.dagster_names import APPROVAL, ARRAY, LAUNCH_TAG, PLAN, RECOMPUTE_TAG, REUSED, SHARDS
from census_tf_dagster.operate.graphql import Deployment, expect
from census_tf_dagster.operate.remote_set import RemoteSet
from census_tf_dagster.operate.shard_ranges import compact, ranges

RUNNING = ("REQUESTED", "CANCELING", "FAILING")
SUCCEEDED = ("COMPLETED_SUCCESS", "COMPLETED")
"""The statuses of backfills that have not ended, and of those that succeeded."""

# Dagster raises when a query asks for the targets of an asset that a backfill lacks, so this query asks for none.
RUNNING_BACKFILLS = """query Running($statuses: [BulkActionStatus!]) {
  partitionBackfillsOrError(filters: {statuses: $statuses}) {
    __typename
    ... on Error { message }
    ... on PartitionBackfills { results { id status tags { key value } } }
  }
}"""

BACKFILL = """query Backfill($shards: AssetKeyInput!, $id: String!) {
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
    """The work of a backfill for a release."""

    plan: bool
    """Whether it makes the plan and its approval. The person who launches has approved."""
    shards: tuple[int, ...]
    array: bool
    recompute: bool
    reused: bool = False
    """Whether it also copies the shards' reused cells."""

    def covers(self, other: "LaunchScope") -> bool:
        """Tell whether this work includes all the work of `other`."""
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
    """A backfill in a running deployment."""

    id: str
    status: str
    created: float
    """Seconds since 1970."""
    error: str | None
    work: LaunchScope

    @property
    def is_running(self) -> bool:
        """Whether it has not ended yet."""
        return self.status in RUNNING


def start(deployment: Deployment, remote_set: RemoteSet, release: str, work: LaunchScope) -> str:
    """Start a backfill and return its id. Dagster runs plan, approval, shards and array once each, in this order.

    Raises
    ------
    UserError
        When Dagster refuses. The message includes Dagster's own.
    """
    shards = [(remote_set.partition(release, a), remote_set.partition(release, b)) for a, b in ranges(work.shards)]
    targets = [(asset, shards) for asset in (SHARDS, *([REUSED] if work.reused else []))]
    wanted_too = ((PLAN, work.plan), (APPROVAL, work.plan), (ARRAY, work.array))
    targets += [(asset, [(release, release)]) for asset, wanted in wanted_too if wanted]
    tags = {LAUNCH_TAG: f"{remote_set.name}/{release}"}
    params: dict[str, object] = {
        "title": f"launch {remote_set.name} {release}",
        "partitionsByAssets": [
            {"assetKey": remote_set.key(asset), "partitions": {"ranges": [{"start": a, "end": b} for a, b in keys]}}
            for asset, keys in targets
        ],
    }
    if work.recompute:
        tags[RECOMPUTE_TAG] = "true"
        # Every run of the backfill receives this. Dagster ignores the configuration of ops that a run does not have.
        ops = {
            f"{remote_set.name}__{asset}": {"config": {"recompute": True}} for asset, keys in targets if keys is shards
        }
        params["runConfigData"] = json.dumps({"ops": ops})
    params["tags"] = [{"key": key, "value": value} for key, value in tags.items()]
    answer = deployment.ask(LAUNCH, params=params)["launchPartitionBackfill"]
    return str(expect(answer, "LaunchBackfillSuccess", f"launch of {remote_set.name} {release}")["backfillId"])


def cancel(deployment: Deployment, backfill_id: str) -> None:
    """Ask Dagster to end a backfill and its runs. The daemon does it in its next iteration."""
    answer = deployment.ask(CANCEL, id=backfill_id)["cancelPartitionBackfill"]
    expect(answer, "CancelBackfillSuccess", f"cancelling backfill {backfill_id}")


def find_running(deployment: Deployment, remote_set: RemoteSet, release: str) -> Backfill | None:
    """Return the first launched backfill of a release that has not ended; None when there is none.

    A backfill that is being cancelled or is failing is returned only when there is no other.
    """
    answer = deployment.ask(RUNNING_BACKFILLS, statuses=RUNNING)["partitionBackfillsOrError"]
    mine = [
        one
        for one in expect(answer, "PartitionBackfills", "backfills")["results"]
        if {"key": LAUNCH_TAG, "value": f"{remote_set.name}/{release}"} in one["tags"]
    ]
    if not mine:
        return None
    # Dagster returns the last stored one first. Timestamps are taken long before storing, so they give no order.
    first = min(reversed(mine), key=lambda one: one["status"] != "REQUESTED")
    return fetch(deployment, remote_set, release, first["id"])


def fetch(deployment: Deployment, remote_set: RemoteSet, release: str, backfill_id: str) -> Backfill:
    """Return a backfill by its id.

    Raises
    ------
    UserError
        When the deployment does not have it.
    """
    answer = deployment.ask(BACKFILL, shards=remote_set.key(SHARDS), id=backfill_id)["partitionBackfillOrError"]
    return _backfill(expect(answer, "PartitionBackfill", f"backfill {backfill_id}"), release)


def _backfill(answer: Mapping[str, Any], release: str) -> Backfill:
    targeted = answer["partitionsTargetedForAssetKey"] or {}
    prefix = f"{release}|"
    shards = {int(key.removeprefix(prefix)) for key in targeted.get("partitionKeys") or () if key.startswith(prefix)}
    assets = {key["path"][-1] for key in answer["assetSelection"] or ()}
    return Backfill(
        id=answer["id"],
        status=answer["status"],
        created=answer["timestamp"],
        error=answer["error"] and answer["error"]["message"].strip(),
        work=LaunchScope(
            plan=PLAN in assets,
            shards=tuple(sorted(shards)),
            array=ARRAY in assets,
            reused=REUSED in assets,
            recompute={"key": RECOMPUTE_TAG, "value": "true"} in answer["tags"],
        ),
    )
