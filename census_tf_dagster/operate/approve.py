"""`approve`: let the shards of a release spend what its plan says."""

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
    """Show what a release's current plan costs, and approve it; return the exit code.

    Parameters
    ----------
    url
        The deployment's webserver.
    name, release
        Set and release.
    plan
        Approve only this plan; None: the one that is shown.
    as_json
        Print one JSON object; what it takes goes to stderr.

    Raises
    ------
    UserError
        When the webserver does not answer, set or release are unknown, there is no plan, or another one is current.
    """
    deployment = Deployment.at(url)
    found = find_set(deployment, name)
    found.check_release(release)
    made = materializations(deployment, found, PLAN, [release]).get(release)
    if made is None:
        raise UserError(
            f"the plan of {name} {release} is missing, so nobody knows what there is to approve: materialize "
            f"{name}/{PLAN} of {release} first (`launch` does it, and needs no approval)."
        )
    current = made.texts["plan"]
    if plan not in (None, current):
        raise UserError(f"the plan of {name} {release} is {current}, not {plan}: look at it, then approve that one.")
    print(f"{name} {release}, {_amount(made)}", flush=True, file=sys.stderr if as_json else sys.stdout)
    run = _launch(deployment, found, release, current)
    while (now := fetch_runs(deployment, found, {"runIds": [run]})[0]).ended is None:
        time.sleep(POLL_SECONDS)
    if now.status != "SUCCESS":
        reason = failure_reason(deployment, run)
        print(f"not approved: {deployment.url}/runs/{run}\n    {reason}", file=sys.stderr)
        return 1
    if as_json:
        print(json.dumps({"set": name, "release": release, "plan": current, "approved": True, "run": run}))
        return 0
    print(f"approved. Where the set starts by itself its shards follow; otherwise: launch {name} {release}")
    return 0


def _amount(made: Materialization) -> str:
    """Return what a plan or an approval says that the work takes."""
    known = {**made.numbers, **made.figures}

    def figure(name: str, digits: int) -> str:
        return f"{known[name]:,.{digits}f}" if name in known else "an unknown number of"

    return (
        f"plan {made.texts['plan']}: {figure('tokens_to_compute', 0)} tokens to compute, {figure('gpu_hours', 1)} GPU "
        f"hours, {figure('cost_usd', 2)} USD, {figure('days_with_the_fleet', 1)} days with the fleet (rate: "
        f"{made.texts['rate']})"
    )


def approval_text(deployment: Deployment, of: RemoteSet, release: str) -> str | None:
    """Return what was approved last for a release and by whom, or what is asked since; None when neither is there."""
    given = materializations(deployment, of, APPROVAL, [release]).get(release)
    answer = deployment.ask(ASKED, asset=of.key(APPROVAL), release=release)["assetNodeOrError"]
    asked = expect(answer, "AssetNode", f"{of.name}/{APPROVAL}")["assetObservations"]
    if asked and (given is None or float(asked[0]["timestamp"]) / 1000 > given.at):
        return str(asked[0]["description"])
    return f"by {given.texts.get('approved_by', 'somebody')}, {_amount(given)}" if given else None


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # A container's numeric user has no name.
        return f"user {os.getuid()}"


def _launch(deployment: Deployment, of: RemoteSet, release: str, plan: str) -> str:
    config = {"plan": plan, "by": f"{_user()}, from {platform.node()}"}
    params: dict[str, Any] = {
        "selector": {
            "repositoryLocationName": of.location,
            "repositoryName": "__repository__",
            "pipelineName": "__ASSET_JOB",
            "assetSelection": [of.key(APPROVAL)],
            "assetCheckSelection": [],
        },
        "mode": "default",
        "runConfigData": json.dumps({"ops": {f"{of.name}__{APPROVAL}": {"config": config}}}),
        "executionMetadata": {"tags": [{"key": "dagster/partition", "value": release}]},
    }
    answer = deployment.ask(LAUNCH, executionParams=params)["launchPipelineExecution"]
    run: str = expect(answer, "LaunchRunSuccess", f"approval of {of.name} {release}")["run"]["runId"]
    return run
