"""Old plans and arrays are kept by default, and deleted or archived by policy; needed ones never are."""

import json
import os
import shutil
import time
from pathlib import Path

import boto3
import dagster as dg
import pytest

from census_tf_dagster.config.retention import Retention, read_retention
from census_tf_dagster.errors import UserError
from census_tf_dagster.io.storage import Storage
from census_tf_dagster.orchestration.resources import StoreResource
from census_tf_dagster.orchestration.retention_job import build_retention
from census_tf_dagster.pipeline.finish_array import finish_array
from census_tf_dagster.pipeline.plan_release import make_plan
from census_tf_dagster.store.inventory import inspect_store
from census_tf_dagster.store.prune import Candidate, announce, apply, candidates
from tests.support.builders import fill, tiny
from tests.support.project import RELEASE, Project, read_array

DAY = 86400
OTHERS = ("2023-05-15", "2023-12-15", "2024-07-01", "2025-01-30")
"""Releases with copies of one real array. A policy distinguishes releases only by name."""


def age(folder: Path, days: float) -> None:
    """Let everything below `folder` have been written so many days ago."""
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - days * DAY,) * 2)


@pytest.fixture
def old(project: Project) -> Project:
    """Five releases of one set, finished 100 days ago."""
    tiny(project, cells=40, shards=1)
    with project.context("tiny") as context:
        fill(context)
        finish_array(context)
    store = project.folder / "store" / "tiny"
    for release in OTHERS:
        shutil.copytree(store / RELEASE, store / release)
    age(store, 100)
    return project


def policy(project: Project, text: str) -> None:
    (project.folder / "sets" / "retention.yaml").write_text(text)


def chosen(project: Project, **fields: object) -> list[str]:
    retention = Retention.model_validate(fields)
    return [one.holding.release for one in candidates(str(project.folder / "store"), Storage(), retention)]


def test_nothing_is_touched_by_default(old: Project) -> None:
    done = old.command("prune")
    assert (done.returncode, done.stdout) == (0, "policy keep: 0 arrays\n")


def test_expire_shows_first_and_wants_the_word(old: Project, tmp_path: Path) -> None:
    policy(old, "policy: expire\nreleases: 3\n")
    shown = old.command("prune")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("policy expire: 2 arrays\n  tiny/2023-05-15/")
    assert "40 cells, " in shown.stdout
    assert "verified, idle for 100 days" in shown.stdout
    word = shown.stdout.split("--confirm ")[1].strip()
    wrong = old.command("prune", "--confirm", "0123456789ab")
    assert wrong.returncode == 1
    assert f"expected {word}, the word of the present list. Nothing was done" in wrong.stderr
    store = old.folder / "store" / "tiny"
    assert len(list(store.glob("*/*/embeddings"))) == 5
    done = old.command("prune", "--confirm", word, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["done"] is True
    assert sorted(path.parts[-3] for path in store.glob("*/*/embeddings")) == [*OTHERS[2:], RELEASE]
    assert len(read_array(old.array("tiny"), tmp_path).ids) == 40
    # What was confirmed was those; nothing else goes by the same word.
    again = old.command("prune", "--confirm", word)
    assert again.returncode == 1
    assert len(list(store.glob("*/*/embeddings"))) == 3


def test_what_no_policy_touches(old: Project) -> None:
    assert chosen(old, policy="expire", releases=1) == list(OTHERS)
    store = old.folder / "store" / "tiny"
    # Written to lately: work may be under way.
    (identity,) = (store / OTHERS[0]).iterdir()
    fragments = next(path for path in (identity / "embeddings" / "__fragments").rglob("*") if path.is_file())
    os.utime(fragments)
    assert chosen(old, policy="expire", releases=1) == list(OTHERS[1:])
    assert chosen(old, policy="expire", releases=1, days=101) == []
    # Damaged: a person looks at that.
    (identity,) = (store / OTHERS[1]).iterdir()
    (identity / "plan" / "current.json").unlink()
    assert chosen(old, policy="expire", releases=1) == list(OTHERS[2:])
    # The newest verified array of a set, however old: newer releases have a plan only.
    shutil.rmtree(store / RELEASE)
    with old.context("tiny") as context:
        make_plan(context)
    age(store, 100)
    assert chosen(old, policy="expire", releases=1) == [OTHERS[0], OTHERS[2]]


def test_what_another_plan_names_as_its_source_stays(old: Project) -> None:
    store = old.folder / "store" / "tiny"
    (source,) = (store / OTHERS[2]).iterdir()
    (newest,) = (store / RELEASE).iterdir()
    pointer = newest / "plan" / "current.json"
    content = json.loads(pointer.read_text())
    assert chosen(old, policy="expire", releases=1) == list(OTHERS)
    for named in (str(source), f"{source}/embeddings"):
        # Whatever else a plan may hold: this one has an entry that is not known yet, so it is damaged as well, and the
        # newest that is verified is the one before it.
        pointer.write_text(json.dumps(content | {"reuse": {"from": [named]}}))
        age(store, 100)
        assert chosen(old, policy="expire", releases=1) == list(OTHERS[:2])
    pointer.write_text(json.dumps(content | {"reuse": {"from": []}}))
    age(store, 100)
    assert chosen(old, policy="expire", releases=1) == list(OTHERS[:3])


def test_a_wrong_policy_names_the_entry(tmp_path: Path) -> None:
    assert read_retention(tmp_path) == Retention()
    for text, message in (
        ("policy: delete", "retention.yaml:1: policy is 'delete'"),
        ("policy: expire\nreleases: 0", "retention.yaml:2: releases is 0"),
        ("after: 3", "retention.yaml:1: after"),
        ("[", "retention.yaml:1: this is not valid YAML"),
        ("", "It should be one mapping; docs/releases.md shows an example"),
    ):
        (tmp_path / "retention.yaml").write_text(text)
        with pytest.raises(UserError) as caught:
            read_retention(tmp_path)
        assert message in str(caught.value)


def test_the_schedule_lists_first_and_acts_a_week_later(old: Project) -> None:
    store = old.folder / "store"
    retention = Retention(policy="expire", releases=3)
    defs = dg.Definitions.merge(
        build_retention(retention), dg.Definitions(resources={"store": StoreResource(location=str(store))})
    )
    (schedule,) = build_retention(retention).schedules or ()
    assert isinstance(schedule, dg.ScheduleDefinition)
    assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED
    context = defs.resolve_job_def("retention_job")

    def arrays() -> list[str]:
        return sorted(path.parts[-3] for path in store.glob("*/*/*/embeddings"))

    with dg.DagsterInstance.ephemeral() as instance:
        assert context.execute_in_process(instance=instance).success
        assert context.execute_in_process(instance=instance).success
        assert len(arrays()) == 5
        listed = json.loads((store / "retention.json").read_text())
        assert sorted(name.split("/")[1] for name in listed) == list(OTHERS[:2])
        week = {name: at - 7 * DAY for name, at in listed.items()}
        (store / "retention.json").write_text(json.dumps(week))
        # A run that waits for one of them keeps it.
        shards = dg.AssetKey(["tiny", "shard_embeddings"])
        instance.add_run(
            dg.DagsterRun(
                job_name="__ASSET_JOB",
                asset_selection=frozenset([shards]),
                tags={"dagster/partition": f"{OTHERS[0]}|0"},
                status=dg.DagsterRunStatus.STARTED,
            )
        )
        assert context.execute_in_process(instance=instance).success
        assert arrays() == [OTHERS[0], *OTHERS[2:], RELEASE]


def test_what_is_no_candidate_any_more_is_forgotten(old: Project) -> None:
    store, storage = str(old.folder / "store"), Storage()
    found = candidates(store, storage, Retention(policy="expire", releases=3))
    assert announce(store, storage, found) == []
    assert announce(store, storage, []) == []
    assert json.loads(storage.read(f"{store}/retention.json")) == {}
    assert announce(store, storage, found) == []


def test_a_local_store_has_no_archive(old: Project) -> None:
    policy(old, "policy: archive\n")
    word = old.command("prune").stdout.split("--confirm ")[1].strip()
    refused = old.command("prune", "--confirm", word)
    assert refused.returncode == 1
    assert "store has no cheaper storage class: use keep or expire." in refused.stderr


@pytest.fixture
def remote(s3: str, project: Project) -> tuple[Project, str]:
    """Two finished releases in a store on S3."""
    project.env |= {
        "CENSUS_TF_STORE": "s3://retained/store",
        "CENSUS_TF_STORE_S3_ENDPOINT": s3,
        "CENSUS_TF_STORE_S3_REGION": "us-east-1",
    }
    tiny(project, cells=40, shards=1)
    shutil.copytree(project.census, project.census.with_name("2024-07-01"))
    for release in ("2024-07-01", RELEASE):
        with project.context("tiny", release) as context:
            fill(context)
            finish_array(context)
    return project, s3


def test_archive_moves_to_another_storage_class_and_stays_readable(remote: tuple[Project, str]) -> None:
    project, endpoint = remote
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")

    def classes() -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for one in client.list_objects_v2(Bucket="retained", Prefix="store/tiny/")["Contents"]:
            found.setdefault(one["Key"].split("/")[2], set()).add(one["StorageClass"])
        return found

    policy(project, "policy: archive\nreleases: 1\ndays: 1\n")
    done = project.command("prune")  # All was written today.
    assert (done.stdout, done.stderr) == ("policy archive: 0 arrays\n", "")
    retention = Retention(policy="archive", releases=1, days=1)
    with project.context("tiny", "2024-07-01") as context:
        verified = context.folder
        assert classes() == {"2024-07-01": {"STANDARD"}, RELEASE: {"STANDARD"}}
        (holding,) = [
            one for one in _everything("s3://retained/store", context.store) if one.holding.release == "2024-07-01"
        ]
        apply("s3://retained/store", context.store, retention, [holding])
        assert classes() == {"2024-07-01": {"GLACIER_IR"}, RELEASE: {"STANDARD"}}
        assert context.store.is_archived(verified.root)
    assert project.command("verify", "tiny", "2024-07-01", "--full").returncode == 0


def _everything(store: str, storage: Storage) -> list[Candidate]:
    return [Candidate(one, 100) for one in inspect_store(store, storage)]
