"""The command `approve`: materializes the asset `approval` of a release after showing the cost of its plan."""

import getpass
import json
import os
import platform
import sys
import time
from typing import Any

from census_tf_dagster.config.dagster_names import APPROVAL, PLAN
from census_tf_dagster.errors import UserError
from census_tf_dagster.operate.graphql import Deployment, expect
from census_tf_dagster.operate.remote_set import RemoteSet, find_set
from census_tf_dagster.operate.runs import Materialization, failure_reason, fetch_runs, materializations

POLL_SECONDS = 1.0

LAUNCH = """mutation Approve($executionParams: ExecutionParams!) {
  launchPipelineExecution(executionParams: $executionParams) {
    __typename
    ... on Error { message }
    ... on RunConfigValidationInvalid { errors { message } }
    ... on LaunchRunSuccess { run { runId } }
  }
}"""

ASKED = """query Asked($asset: AssetKeyInput!, $release: String!) {
  assetNodeOrError(assetKey: $asset) {
    __typename
    ... on Error { message }
    ... on AssetNode { assetObservations(partitions: [$release], limit: 1) { timestamp description } }
  }
}"""


def approve(url: str, name: str, release: str, plan: str | None, *, as_json: bool = False) -> int:
    """Show the cost of a release's current plan, approve it, and return the exit code.

    Parameters
    ----------
    url
        The deployment's webserver.
    name, release
        The set and the release.
    plan
        Approve only this plan; None: approve the current plan.
    as_json
        Print one JSON object; the cost goes to stderr.

    Raises
    ------
    UserError
        When the webserver does not answer, the set or release is unknown, there is no plan, or another plan is
        current.
    """
    deployment = Deployment.at(url)
    remote_set = find_set(deployment, name)
    remote_set.check_release(release)
    made = materializations(deployment, remote_set, PLAN, [release]).get(release)
    if made is None:
        raise UserError(
            f"the plan of {name} {release} is missing, so there is nothing to approve. Materialize "
            f"{name}/{PLAN} of {release} first (`launch` does that, and needs no approval)."
        )
    current = made.texts["plan"]
    if plan not in (None, current):
        raise UserError(
            f"--plan is {plan}; expected {current}, the current plan of {name} {release}. Read its cost, then "
            "approve that plan."
        )
    print(f"{name} {release}, {_amount(made)}", flush=True, file=sys.stderr if as_json else sys.stdout)
    run = _launch(deployment, remote_set, release, current)
    while (now := fetch_runs(deployment, remote_set, {"runIds": [run]})[0]).ended is None:
        time.sleep(POLL_SECONDS)
    if now.status != "SUCCESS":
        reason = failure_reason(deployment, run)
        print(f"not approved: {deployment.url}/runs/{run}\n    {reason}", file=sys.stderr)
        return 1
    if as_json:
        print(json.dumps({"set": name, "release": release, "plan": current, "approved": True, "run": run}))
        return 0
    print(f"approved. With auto_start the shards start now; otherwise run: census-tf-dagster launch {name} {release}")
    return 0


def _amount(made: Materialization) -> str:
    """Return the cost of the work from the metadata of a plan or an approval."""
    known = {**made.numbers, **made.figures}

    def figure(name: str, digits: int) -> str:
        return f"{known[name]:,.{digits}f}" if name in known else "an unknown number of"

    return (
        f"plan {made.texts['plan']}: {figure('tokens_to_compute', 0)} tokens to compute, {figure('gpu_hours', 1)} GPU "
        f"hours, {figure('cost_usd', 2)} USD, {figure('days_with_the_fleet', 1)} days with the fleet (rate: "
        f"{made.texts['rate']})"
    )


def approval_text(deployment: Deployment, remote_set: RemoteSet, release: str) -> str | None:
    """Return the last approval of a release with its author, or a newer request for one; None when there is neither."""
    given = materializations(deployment, remote_set, APPROVAL, [release]).get(release)
    answer = deployment.ask(ASKED, asset=remote_set.key(APPROVAL), release=release)["assetNodeOrError"]
    asked = expect(answer, "AssetNode", f"{remote_set.name}/{APPROVAL}")["assetObservations"]
    if asked and (given is None or float(asked[0]["timestamp"]) / 1000 > given.at):
        return str(asked[0]["description"])
    return f"by {given.texts.get('approved_by', 'somebody')}, {_amount(given)}" if given else None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # The numeric user of a container has no name.
        return f"user {os.getuid()}"


def _launch(deployment: Deployment, remote_set: RemoteSet, release: str, plan: str) -> str:
    config = {"plan": plan, "by": f"{_user()}, from {platform.node()}"}
    params: dict[str, Any] = {
        "selector": {
            "repositoryLocationName": remote_set.location,
            "repositoryName": "__repository__",
            "pipelineName": "__ASSET_JOB",
            "assetSelection": [remote_set.key(APPROVAL)],
            "assetCheckSelection": [],
        },
        "mode": "default",
        "runConfigData": json.dumps({"ops": {f"{remote_set.name}__{APPROVAL}": {"config": config}}}),
        "executionMetadata": {"tags": [{"key": "dagster/partition", "value": release}]},
    }
    answer = deployment.ask(LAUNCH, executionParams=params)["launchPipelineExecution"]
    run: str = expect(answer, "LaunchRunSuccess", f"approval of {remote_set.name} {release}")["run"]["runId"]
    return run
