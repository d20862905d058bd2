"""`launch` and `status` against a real webserver and a real daemon; the soak test launches 128 shards."""

import json
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Barrier, Thread
from typing import Any
from unittest import mock

import pytest

from census_tf_dagster.config.dagster_names import LAUNCH_TAG
from census_tf_dagster.durations import duration
from census_tf_dagster.errors import UserError
from census_tf_dagster.operate.backfills import cancel, find_running, start
from census_tf_dagster.operate.graphql import Deployment, expect
from census_tf_dagster.operate.launch import LaunchRequest, launch
from census_tf_dagster.operate.remote_set import find_set
from census_tf_dagster.operate.runs import Materialization, Run, fetch_runs, seconds_left
from census_tf_dagster.operate.shard_ranges import compact, parse_shards
from census_tf_dagster.pipeline.embed_shard import embed_shard
from census_tf_dagster.pipeline.finish_array import finish_array
from census_tf_dagster.pipeline.plan_release import make_plan
from census_tf_dagster.store.array import EmbeddingsArray
from tests.support.builders import tiny
from tests.support.deployment import PATIENCE, QUICK, Operator, free_port, materialize, running_locally, until
from tests.support.project import BOUND, RELEASE, Project, read_array, relative_errors

pytestmark = pytest.mark.takes(330)

CELLS = 120
OTHER_RELEASES = ("2025-01-30", "2024-07-01")
TERMINATE = """mutation Terminate($runIds: [String!]!, $terminatePolicy: TerminateRunPolicy) {
  terminateRuns(runIds: $runIds, terminatePolicy: $terminatePolicy) {
    __typename
    ... on TerminateRunsResult { terminateRunResults { __typename } }
  }
}"""

BACKFILLS = """{ partitionBackfillsOrError {
  ... on PartitionBackfills { results { id status tags { key value } } }
} }"""


def half_way(seen: list[dict[str, Any]], operator: Operator) -> bool:
    """Ask for the status again. Tell whether all shards have a run, and one is running."""
    seen.append(operator.status("tiny"))
    return bool(seen[-1]["shards"]["running"]) and not seen[-1]["shards"]["missing"]


@dataclass
class Story:
    """What one operator saw, in this order. The daemon acts every 30 s, so several things happen at the same time."""

    operator: Operator
    before: dict[str, Any]
    interrupted: tuple[int, str]
    meanwhile: dict[str, Any]
    attached: tuple[int, str]
    broken: tuple[int, str]
    after_broken: dict[str, Any]
    runs: Counter[tuple[str, str]]
    after: dict[str, Any]
    other_work: subprocess.CompletedProcess[str]
    without_waiting: subprocess.CompletedProcess[str]
    cancelled: tuple[int, str]
    recomputed: tuple[int, str]


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    project = tiny(Project(tmp_path_factory.mktemp("operate")), cells=CELLS, megabatch_size=CELLS)
    other = project.folder / "other_checkpoint"
    subprocess.run(["cp", "-r", str(project.checkpoint), str(other)], check=True)
    project.add_set("broken", organism="homo_sapiens", shards=1, checkpoint=str(other))
    project.add_set("long", organism="homo_sapiens", shards=1, megabatch_size=1)
    assert project.command("release", "add", RELEASE).returncode == 0
    with running_locally(project, daemon=True) as operator:
        before = operator.status("tiny")
        first = operator.begin("first", "launch", "tiny", RELEASE)
        broken = operator.begin("broken", "launch", "broken", RELEASE)
        first.says("shards 0/4 done")
        first.process.send_signal(signal.SIGINT)
        interrupted = first.end()
        second = operator.begin("second", "launch", "tiny", RELEASE)
        broken.says("plan done")
        (other / "model_weights.pt").unlink()
        seen = [operator.status("tiny")]
        until(lambda: half_way(seen, operator), "running shards")
        attached, failed = second.end(), broken.end()
        runs, after, after_broken = operator.runs(), operator.status("tiny"), operator.status("broken")

        again = operator.begin("again", "launch", "tiny", RELEASE, "--shards", "2", "--recompute")
        without_waiting = operator.command("launch", "broken", RELEASE, "--shards", "0", "--no-wait")
        cancelled = operator.begin("cancelled", "launch", "broken", RELEASE, "--shards", "0")
        again.says("launched backfill")
        other_work = operator.command("launch", "tiny", RELEASE, "--shards", "1-2")
        cancelled.says("shards 0/1 done")
        cancel(Deployment.at(operator.url), without_waiting.stdout.split()[2])
        operator.stop("dagster-webserver")
        again.says("the status is unknown, trying again: no answer from the webserver")
        operator.serve("dagster-webserver")
        until(operator.answers, "the webserver again")
        yield Story(
            operator=operator,
            before=before,
            interrupted=interrupted,
            meanwhile=seen[-1],
            attached=attached,
            broken=failed,
            after_broken=after_broken,
            runs=runs,
            after=after,
            other_work=other_work,
            without_waiting=without_waiting,
            cancelled=cancelled.end(),
            recomputed=again.end(),
        )


def test_launch_survives_its_interruption(story: Story) -> None:
    code, said = story.interrupted
    assert code == 130
    assert "launched backfill" in said
    assert f"({QUICK}): the plan, shards 0-3, the array\n" in said
    assert "interrupted; the backfill continues in Dagster.\n" in said
    assert f"status tiny {RELEASE} --url {story.operator.url}\n" in said
    code, said = story.attached
    assert code == 0
    assert said.startswith("attached to backfill ")
    assert "shards 4/4 done, 0 running, 0 failed, 0 left; array done" in said
    assert f"done: tiny {RELEASE}: the plan, shards 0-3, the array" in said
    assert said.endswith(f"array: {story.operator.project.array('tiny')}\n")


def test_plan_shards_and_array_run_once(story: Story, tmp_path: Path) -> None:
    expected = {(f"tiny/{asset}", RELEASE): 1 for asset in ("obs_id_plan", "approval", "embeddings_array")}
    expected |= {("tiny/shard_embeddings", f"{RELEASE}|{shard}"): 1 for shard in range(4)}
    assert {key: n for key, n in story.runs.items() if key[0].startswith("tiny/")} == expected
    array = read_array(story.operator.project.array("tiny"), tmp_path)
    assert len(array.ids) == story.after["cells_done"] == story.after["cells_planned"]
    assert array.stored_values == array.values.size


def test_status_at_several_moments(story: Story) -> None:
    nothing = {"done": 0, "running": 0, "queued": 0, "failed": 0, "missing": 4}
    assert story.before["shard_counts"] == nothing
    assert [story.before[key] for key in ("plan", "array", "verified", "backfill")] == [
        "missing",
        "missing",
        None,
        None,
    ]
    assert story.before["cells_planned"] is None
    counts = story.meanwhile["shard_counts"]
    assert story.meanwhile["plan"] == "done"
    assert story.meanwhile["array"] == "missing"
    assert story.meanwhile["backfill"] in story.attached[1]
    assert counts["running"] in (1, 2)
    assert counts["running"] + counts["queued"] + counts["done"] == 4
    assert story.after["shards"] == {"done": "0-3", "running": "", "queued": "", "failed": "", "missing": ""}
    assert [story.after[key] for key in ("plan", "array", "backfill", "finish")] == ["done", "done", None, None]
    assert story.after["verified"] is True
    assert story.after["cells_planned"] == CELLS
    assert story.after["array_path"] == str(story.operator.project.array("tiny"))
    assert (story.after_broken["shards"]["failed"], story.after_broken["array"]) == ("0", "missing")


def test_failed_shards_are_shown_with_their_reason(story: Story) -> None:
    code, said = story.broken
    assert code == 1
    assert f"shard_embeddings {RELEASE}|0 failure: {story.operator.url}/runs/" in said
    assert "model_weights.pt" in said
    assert "model_weights.pt" in story.after_broken["failures"]["0"]
    assert said.endswith(f"launch only these shards: census-tf-dagster launch broken {RELEASE} --shards 0\n")


def test_recompute_of_one_shard(story: Story) -> None:
    code, said = story.recomputed
    assert code == 0, said
    assert "shards 2 (recompute), the array" in said
    assert "the status is unknown, trying again: no answer from the webserver" in said
    new = story.operator.runs() - story.runs
    assert {key: n for key, n in new.items() if key[0].startswith("tiny/")} == {
        ("tiny/shard_embeddings", f"{RELEASE}|2"): 1,
        ("tiny/embeddings_array", RELEASE): 1,
    }
    fragments = (story.operator.project.array("tiny") / "__fragments").iterdir()
    assert len(list(fragments)) == 5
    status = story.operator.status("tiny")
    assert (status["shards"]["done"], status["cells_done"], status["array"]) == ("0-3", CELLS, "done")
    assert status["verified"] is True


def test_other_work_does_not_attach(story: Story) -> None:
    assert story.other_work.returncode == 1
    assert (
        "is still running with shards 2 (recompute), the array; you asked for shards 1-2, the array."
        in story.other_work.stderr
    )


def test_a_cancelled_backfill_is_no_success(story: Story) -> None:
    assert (story.without_waiting.returncode, story.without_waiting.stderr) == (0, "")
    launched, look, follow = story.without_waiting.stdout.splitlines()
    assert launched.startswith("launched backfill ")
    assert look.startswith("  look:   census-tf-dagster status broken")
    assert follow.startswith("  follow: the same launch command again")
    code, said = story.cancelled
    assert code == 1
    assert said.startswith(f"attached to backfill {launched.split()[2]} ")
    assert "ended as CANCELED" in said
    assert said.endswith(f"To continue: census-tf-dagster launch broken {RELEASE} --shards 0\n")


def test_status_as_text(story: Story) -> None:
    done = story.operator.command("status", "tiny")
    assert (done.returncode, done.stderr) == (0, "")
    assert "  shards  4: 4 done (0-3)\n" in done.stdout
    assert f"  cells   {CELLS} of {CELLS}\n" in done.stdout


def test_terminate_commits_nothing_partial_and_the_rest_follows(story: Story, tmp_path: Path) -> None:
    operator = story.operator
    deployment = Deployment.at(operator.url)
    of = find_set(deployment, "long")
    with operator.project.context("long") as context:
        make_plan(context)
    run = materialize(deployment, of, 0)
    commits = operator.project.array("long") / "__commits"
    until(lambda: any(commits.iterdir()), f"a commit of run {run}")
    answer = deployment.ask(TERMINATE, runIds=[run], terminatePolicy="SAFE_TERMINATE")["terminateRuns"]
    assert answer["terminateRunResults"] == [{"__typename": "TerminateRunSuccess"}]
    asked = time.monotonic()
    until(lambda: fetch_runs(deployment, of, {"runIds": [run]})[0].ended is not None, f"the end of run {run}")
    assert time.monotonic() - asked < 15
    assert fetch_runs(deployment, of, {"runIds": [run]})[0].status == "CANCELED"
    shards = operator.status("long")["shard_counts"]
    assert (shards["done"], shards["running"], shards["queued"]) == (0, 0, 0)
    with operator.project.context("long") as context:
        fragments = EmbeddingsArray.open(context.folder.array, context.store, context.identity).fragments()
        assert {fragment.values for fragment in fragments} == {16}
        assert 0 < len(fragments) < CELLS
        rest = embed_shard(context, 0)
        assert (rest.cells_before, rest.cells_computed) == (len(fragments), CELLS - len(fragments))
        assert finish_array(context).excess_fragments == 0
    array, same_cells = (read_array(operator.project.array(name), tmp_path) for name in ("long", "tiny"))
    assert array.ids.tolist() == list(range(CELLS))
    assert array.stored_values == CELLS * 16
    assert relative_errors(array.values, same_cells.values).max() <= BOUND


def launches(operator: Operator, name: str) -> dict[str, str]:
    """Return the status of all backfills that were launched for a set, by id."""
    results = Deployment.at(operator.url).ask(BACKFILLS)["partitionBackfillsOrError"]["results"]
    tag = {"key": LAUNCH_TAG, "value": f"{name}/{RELEASE}"}
    return {one["id"]: one["status"] for one in results if tag in one["tags"]}


def test_of_two_launches_at_the_same_moment_one_goes_on(
    story: Story, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = launches(story.operator, "broken")
    both_have_looked = Barrier(2, timeout=PATIENCE)

    def start_together(*arguments: Any) -> str:
        both_have_looked.wait()
        return start(*arguments)

    monkeypatch.setattr("census_tf_dagster.operate.launch.start", start_together)
    request = LaunchRequest("broken", RELEASE, shards="0", recompute=False, wait=False)
    with ThreadPoolExecutor(2) as pool:
        codes = list(pool.map(lambda _: launch(story.operator.url, request), range(2)))
    assert codes == [0, 0]
    new = {key: status for key, status in launches(story.operator, "broken").items() if key not in before}
    ((running, _),) = [one for one in new.items() if one[1] == "REQUESTED"]
    ((other, status),) = [one for one in new.items() if one[0] != running]
    assert status in ("CANCELING", "CANCELED")
    said = capsys.readouterr().out
    assert f"launched backfill {running} " in said
    assert f"attached to backfill {running} " in said
    assert other not in said

    # The same with other work: the second has looked before the first was there.
    looks = mock.Mock(wraps=find_running, side_effect=[None, mock.DEFAULT])
    monkeypatch.setattr("census_tf_dagster.operate.launch.find_running", looks)
    monkeypatch.setattr("census_tf_dagster.operate.launch.start", start)
    with pytest.raises(
        UserError, match=f"backfill {running} of broken {RELEASE} is still running with shards 0, the array"
    ):
        launch(story.operator.url, replace(request, recompute=True))
    assert looks.call_count == 2
    new = {key: status for key, status in launches(story.operator, "broken").items() if key not in before}
    assert len(new) == 3
    assert [key for key, status in new.items() if status == "REQUESTED"] == [running]
    cancel(Deployment.at(story.operator.url), running)


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Operator]:
    """A deployment without a daemon, so that nothing can start."""
    project = tiny(Project(tmp_path_factory.mktemp("idle")), cells=CELLS)
    project.add_set("reported", organism="homo_sapiens", shards=12)
    for release in (RELEASE, *OTHER_RELEASES):
        project.census.with_name(release).mkdir(exist_ok=True)
        assert project.command("release", "add", release).returncode == 0
    with running_locally(project, daemon=False) as operator:
        yield operator


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope", RELEASE], "set 'nope' is not in the deployment at http://.*; expected one of: reported, tiny."),
        (
            ["tiny", "1999-01-01"],
            "expected one of: 2025-11-08, 2025-01-30, 2024-07-01. Add it: census-tf-dagster release add 1999-01-01",
        ),
        (["tiny", RELEASE, "--shards", "2,4-6"], "set 'tiny' has no shards 4-6; expected some of its 4 shards, 0-3."),
        (["tiny", RELEASE, "--shards", "7-3"], "--shards has '7-3'; expected numbers and ascending ranges"),
        (["tiny", RELEASE, "--shards", "2"], f"the plan of tiny {RELEASE} is missing, and shards 2 need it"),
        (["tiny", RELEASE], "has no healthy dagster-daemon, so nothing would start. Run `dagster-daemon run"),
    ],
)
def test_checks_come_before_anything_is_launched(idle: Operator, arguments: list[str], message: str) -> None:
    done = idle.command("launch", *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")
    assert re.search(message, done.stderr), done.stderr
    backfills = Deployment.at(idle.url).ask(
        "{ partitionBackfillsOrError { ... on PartitionBackfills { results { id } } } }"
    )
    assert backfills["partitionBackfillsOrError"]["results"] == []
    assert not idle.runs()


def test_status_of_a_set_with_nothing(idle: Operator) -> None:
    done = idle.command("status", "tiny")
    assert (done.returncode, done.stdout) == (0, "tiny: none of its 3 releases has been started\n")
    assert json.loads(idle.command("status", "tiny", "--json").stdout)["releases"] == []
    assert idle.command("status", "nope").returncode == 1


def test_status_of_several_releases(idle: Operator) -> None:
    """Dagster answers with ranges of releases whose shards have equal states. The test reports these states itself."""
    report = """mutation Report($params: ReportRunlessAssetEventsParams!) {
      reportRunlessAssetEvents(eventParams: $params) { __typename }
    }"""
    partitions = {
        "obs_id_plan": [RELEASE, OTHER_RELEASES[0]],
        "shard_embeddings": [f"{release}|{shard}" for release in (RELEASE, *OTHER_RELEASES) for shard in (3, 10)],
    }
    partitions["shard_embeddings"].append(f"{OTHER_RELEASES[1]}|11")
    for asset, keys in partitions.items():
        params = {
            "eventType": "ASSET_MATERIALIZATION",
            "assetKey": {"path": ["reported", asset]},
            "partitionKeys": keys,
        }
        answer = Deployment.at(idle.url).ask(report, params=params)["reportRunlessAssetEvents"]
        expect(answer, "ReportRunlessAssetEventsSuccess", "report")
    done = idle.command("status", "reported", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    shards = {one["release"]: one["shards"]["done"] for one in json.loads(done.stdout)["releases"]}
    assert shards == {RELEASE: "3,10", OTHER_RELEASES[0]: "3,10", OTHER_RELEASES[1]: "3,10-11"}
    text = idle.command("status", "reported").stdout
    assert f"reported {OTHER_RELEASES[1]}\n  plan    missing\n  shards  12: 3 done (3,10-11), 9 missing" in text


def test_no_webserver(project: Project) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    project.env["CENSUS_TF_DAGSTER_URL"] = url
    for command in ("launch", "status"):
        done = project.command(command, "tiny", RELEASE)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"error: no answer from the webserver at {url} (ConnectionError): start it" in done.stderr


class NotDagster(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(int(self.path.split("/")[1]))
        self.end_headers()
        self.wfile.write(b"<html>hello</html>")

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.mark.parametrize(("code", "message"), [(200, "HTTP 200 without GraphQL"), (503, "is not up: HTTP 503")])
def test_a_server_that_is_no_webserver(code: int, message: str) -> None:
    with HTTPServer(("127.0.0.1", 0), NotDagster) as server:
        Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(UserError, match=message):
            Deployment.at(f"http://127.0.0.1:{server.server_port}/{code}/").ask("{ version }")


def test_addresses() -> None:
    assert Deployment.at("http://host:3000/graphql").url == Deployment.at("http://host:3000/").url == "http://host:3000"
    for url in ("host:3000", "3000", "", "http://", "http://host:port", "http://host:3000?x", "ftp://host"):
        with pytest.raises(UserError, match="expected http://HOST:PORT"):
            Deployment.at(url)
    assert Deployment.at("https://host/dagster/").url == "https://host/dagster"
    assert Deployment.at("http://[::1]:3000").url == "http://[::1]:3000"


def test_a_union_is_checked() -> None:
    assert expect({"__typename": "Runs", "results": []}, "Runs", "runs")["results"] == []
    message = "launch of a 1: Dagster answers PythonError, expected LaunchBackfillSuccess. no such partition"
    with pytest.raises(UserError, match=message):
        expect({"__typename": "PythonError", "message": "no such partition"}, "LaunchBackfillSuccess", "launch of a 1")
    with pytest.raises(UserError, match="answers None, expected Runs"):
        expect(None, "Runs", "runs")


@pytest.mark.parametrize(
    ("text", "numbers"), [("3,7-12", (3, 7, 8, 9, 10, 11, 12)), ("0", (0,)), (" 2 - 3 , 2", (2, 3)), ("007", (7,))]
)
def test_parse_shards(text: str, numbers: tuple[int, ...]) -> None:
    assert parse_shards(text) == numbers


@pytest.mark.parametrize("text", ["", ",", "3,", "a", "-1", "1-", "5-3", "1-2-3", "1.5", "0-99999999", "²"])
def test_parse_shards_refuses(text: str) -> None:
    with pytest.raises(UserError, match="expected numbers and ascending ranges such as 3,7-12"):
        parse_shards(text)


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([4], "4"), ([7, 0, 1, 2, 3], "0-3,7"), ([0, 2, 4], "0,2,4"), (range(128), "0-127")]
)
def test_compact(numbers: list[int], text: str) -> None:
    assert compact(numbers) == text
    assert parse_shards(text) == tuple(sorted(numbers)) if text else not numbers


def test_duration() -> None:
    assert [duration(s) for s in (9, 300, 9000)] == ["9 s", "5 min", "2 h 30 min"]


def _run(shard: int, status: str, started: float | None, ended: float | None = None, *, recompute: bool = False) -> Run:
    return Run(
        id=str(shard),
        asset="shard_embeddings",
        partition=f"{RELEASE}|{shard}",
        status=status,
        created=0,
        started=started,
        ended=ended,
        updated=0,
        recompute=recompute,
    )


def test_seconds_left() -> None:
    finished = [_run(0, "SUCCESS", -200, -100), _run(1, "SUCCESS", -200, -196)]
    stored = {
        f"{RELEASE}|{run.shard}": Materialization(run.id, 0, {"cells_computed": computed}, {})
        for run, computed in zip(finished, (50, 0), strict=True)
    }
    active = [_run(2, "STARTED", 40), _run(3, "STARTED", 60), _run(4, "QUEUED", None)]
    # Shard 1 computed nothing, so a shard takes 100 s: 40 s and 60 s are left of two, and one waits.
    assert seconds_left(active, finished, stored, now=100) == (40 + 60 + 100) / 2
    assert seconds_left(active[:2], finished, stored, now=100) == 60
    assert seconds_left(active, finished, stored, now=100, unrequested=2) == 200
    again = _run(0, "QUEUED", None)
    assert seconds_left([*active[:2], again], finished, stored, now=100) == 60
    recompute = _run(0, "QUEUED", None, recompute=True)
    assert seconds_left([*active[:2], recompute], finished, stored, now=100) == 100
    assert seconds_left(active, finished[1:], stored, now=100) is None
    assert seconds_left(active[2:], finished, stored, now=100) is None


def test_seconds_left_between_two_runs() -> None:
    finished = [_run(0, "SUCCESS", 0, 100), _run(1, "SUCCESS", 0, 100)]
    stored = {f"{RELEASE}|{run.shard}": Materialization(run.id, 0, {}, {}) for run in finished}
    waiting = [_run(shard, "QUEUED", None) for shard in (2, 3)]
    assert seconds_left(waiting, finished, stored, now=100) == 100
    assert seconds_left(waiting, finished, stored, now=150) == 200
    assert seconds_left(waiting, finished, stored, now=200) is None


@pytest.mark.soak
def test_launch_of_128_shards(tmp_path: Path) -> None:
    project = tiny(Project(tmp_path), cells=256, shards=128, megabatch_size=2)
    assert project.command("release", "add", RELEASE).returncode == 0
    with running_locally(project, daemon=True) as operator:
        launch = operator.begin("launch", "launch", "tiny", RELEASE)
        code = launch.process.wait(timeout=3600)
        assert code == 0, launch.out.read_text()[-3000:]
        runs = operator.runs()
        assert set(runs.values()) == {1}
        assert len(runs) == 130
        status = operator.status("tiny")
    assert (status["shards"]["done"], status["cells_done"], status["array"]) == ("0-127", 256, "done")
    array = read_array(project.array("tiny"), tmp_path)
    assert len(array.ids) == 256
    assert "128/128 done, 0 running, 0 failed, 0 left; array done" in launch.out.read_text()
