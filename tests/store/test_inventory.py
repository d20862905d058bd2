"""`inspect`, `remove`, `canary` and `launch --dry-run` work as an operator types them."""

import json
from pathlib import Path

import pytest

from census_tf_dagster.pipeline.embed_shard import embed_shard
from census_tf_dagster.pipeline.finish_array import finish_array
from census_tf_dagster.pipeline.plan_release import make_plan
from tests.support.builders import age, tiny
from tests.support.project import BOUND, RELEASE, Project, UpstreamCommand

pytestmark = pytest.mark.takes(50)


def test_inspect_shows_what_is_there_and_remove_asks_twice(project: Project) -> None:
    tiny(project, shards=3)
    assert "there is no store at" in project.command("inspect").stderr
    with project.context("tiny") as context:
        make_plan(context)
        for shard in (0, 2):
            embed_shard(context, shard)
    (project.folder / "store" / "tiny" / RELEASE / "0123456789ab").mkdir()
    done = project.command("inspect", "--json")
    assert done.returncode == 0, done.stderr
    damaged, half = sorted(json.loads(done.stdout)["holdings"], key=lambda holding: holding["state"])
    assert (half["set"], half["release"], half["state"]) == ("tiny", RELEASE, "unverified")
    assert (half["shards_done"], half["shards"], half["cells_planned"]) == (2, 3, 200)
    assert 100 < half["cells_stored"] < 200
    assert half["bytes"] > 1000
    assert (damaged["state"], damaged["identity"]) == ("damaged", "0123456789ab")
    assert "there is no plan" in damaged["problem"]

    with project.context("tiny") as context:
        embed_shard(context, 1)
        finish_array(context)
    identity = half["identity"]
    assert f"tiny/{RELEASE}/{identity}  3/3 shards  200/200 cells" in project.command("inspect").stdout
    folder = project.folder / "store" / "tiny" / RELEASE / identity
    age(folder)
    first = project.command("remove", "tiny", RELEASE, identity)
    assert first.returncode == 1
    assert f"repeat the command with --confirm {identity}" in first.stderr
    wrong = project.command("remove", "tiny", RELEASE, identity, "--confirm", "0123456789ab")
    assert wrong.returncode == 1
    assert folder.is_dir()
    assert "holds no tiny" in project.command("remove", "tiny", RELEASE, "ffffffffffff").stderr
    second = project.command("remove", "tiny", RELEASE, identity, "--confirm", identity)
    assert (second.returncode, second.stderr) == (0, "")
    assert not folder.exists()


def test_canary_compares_with_fp32_and_keeps_only_its_rate(project: Project) -> None:
    tiny(project, compute_precision="bf16")
    done = project.command("canary", "tiny", RELEASE, "--cells", "40", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 1e-5 < found["relative_rms"] < 3e-2
    assert found["cells"] >= 36
    assert found["assays"] == 4
    assert found["release_cells"] == 200
    assert found["release_hours"] > 0
    # The canary stores nothing but its rate, from which the next plan's cost follows.
    assert [path.name for path in (project.folder / "store").rglob("*") if path.is_file()] == ["canary.json"]
    shown = project.command("launch", "tiny", RELEASE, "--dry-run")
    assert "(rate: measured: the canary of this set on CPU)" in shown.stdout
    (project.folder / "store" / "tiny" / "canary.json").write_text('{"tokens": -1}')
    damaged = project.command("launch", "tiny", RELEASE, "--dry-run")
    assert "canary.json is damaged" in damaged.stderr


def test_canary_of_fp32_wants_upstream(project: Project) -> None:
    tiny(project)
    done = project.command("canary", "tiny", RELEASE)
    assert done.returncode == 1
    assert "pass its path with --upstream" in done.stderr
    absent = project.command("canary", "tiny", RELEASE, "--upstream", "nowhere/transcriptformer")
    assert absent.stderr.startswith("error: --upstream nowhere/transcriptformer: there is no such file")
    unknown = project.command("canary", "else", RELEASE)
    assert "there is no set 'else'; expected one of this deployment: tiny" in unknown.stderr


@pytest.mark.upstream
def test_canary_with_upstreams_own_command(project: Project, upstream_command: UpstreamCommand) -> None:
    tiny(project)
    done = project.command("canary", "tiny", RELEASE, "--cells", "24", "--upstream", str(upstream_command.command))
    assert done.returncode == 0, done.stderr
    assert "upstream's own command" in done.stdout
    worst = float(done.stdout.split("worst cell ")[1].split()[0])
    assert worst <= BOUND
    assert not list(Path(project.folder).glob("logs"))


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(project: Project) -> None:
    tiny(project)
    first = project.command("launch", "tiny", RELEASE, "--dry-run")
    assert first.returncode == 0, first.stderr
    assert "would run 4 shards and compute 200 of their 200 cells" in first.stdout
    assert not (project.folder / "store").exists()
    with project.context("tiny") as context:
        make_plan(context)
        done = embed_shard(context, 1)
    assert f"checkpoint: {context.checkpoint.fingerprint} (" in first.stdout
    some = project.command("launch", "tiny", RELEASE, "--dry-run", "--shards", "1,3")
    assert "would run 2 shards" in some.stdout
    assert "compute 0 of" not in some.stdout
    finished = project.command("launch", "tiny", RELEASE, "--dry-run", "--shards", "1")
    assert f"compute 0 of their {done.cells} cells in 0 writes, about 0 bytes" in finished.stdout
    again = project.command("launch", "tiny", RELEASE, "--dry-run", "--shards", "1", "--recompute")
    assert f"compute {done.cells} of their {done.cells} cells" in again.stdout
    beyond = project.command("launch", "tiny", RELEASE, "--dry-run", "--shards", "7")
    assert beyond.returncode == 1
    assert "shard 7 is not in the plan; expected a shard from 0 to 3" in beyond.stderr
