"""Plans and arrays work on S3 with many writers, a failing server and failing disks."""

import os
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import requests

from census_tf_dagster.census.plan import read_plan
from census_tf_dagster.errors import StoreError, UserError
from census_tf_dagster.identity import Identity
from census_tf_dagster.io.s3 import S3Settings
from census_tf_dagster.io.storage import Storage
from census_tf_dagster.pipeline.context import ReleaseContext
from census_tf_dagster.pipeline.finish_array import finish_array
from census_tf_dagster.pipeline.plan_release import make_plan
from census_tf_dagster.store.array import EmbeddingsArray
from tests.support.builders import fill, tiny, value_of
from tests.support.fork_server import SERVERS
from tests.support.moto_servers import REGION, client, moto_server, s3_proxy, upload
from tests.support.on_s3 import on_s3, reader_config
from tests.support.project import BOUND, RELEASE, REPOSITORY, Project, read_array, relative_errors
from tests.support.warm_processes import WarmProcess

pytestmark = pytest.mark.takes(550)

SECRET = "a-secret-that-nobody-may-see"


def start_worker(project: Project, shard: int, *more: str) -> WarmProcess:
    arguments = [str(project.folder), "tiny", str(shard), *more]
    return WarmProcess("tests.support.s3_driver", arguments, REPOSITORY, project.env)


def finish(worker: WarmProcess) -> int:
    """Wait for a worker to succeed; return how many megabatches it committed."""
    output, errors = worker.communicate()
    assert worker.returncode == 0, errors[-3000:]
    return output.count("committed")


def require_all_cells(context: ReleaseContext, endpoint: str, scratch: Path, cells: int) -> None:
    """Read everything back in a new process: every cell once, with the values that the workers wrote."""
    stored = read_array(context.folder.array, scratch, reader_config(endpoint))
    assert np.array_equal(stored.ids, np.arange(cells))
    assert stored.stored_values == cells * 16
    assert np.array_equal(stored.values, value_of(np.arange(cells), 16))


def test_whole_job_with_an_anonymous_census_and_a_signed_store(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    tiny(project, cells=60, shards=2)
    with moto_server() as public, s3_proxy(public, project.folder, share=-1) as anonymous, moto_server() as private:
        upload(project.census, public, "public", f"releases/{RELEASE}")
        iam = client(private, "iam")
        iam.create_user(UserName="worker")
        key = iam.create_access_key(UserName="worker")["AccessKey"]
        allowed = '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}'
        iam.put_user_policy(UserName="worker", PolicyName="store", PolicyDocument=allowed)
        # From here on, the server refuses requests that are not signed with that key.
        requests.post(f"{private}/moto-api/reset-auth", data=b"0", timeout=10).raise_for_status()
        on_s3(project, private)
        project.env |= {
            "CENSUS_TF_CENSUS": "s3://public/releases/{release}",
            "CENSUS_TF_CENSUS_S3_ENDPOINT": anonymous.endpoint,
            "CENSUS_TF_CENSUS_S3_REGION": REGION,
            "AWS_ACCESS_KEY_ID": key["AccessKeyId"],
            "AWS_SECRET_ACCESS_KEY": SECRET,
        }
        unknown = project.command("release", "add", "1999-01-01")
        assert (
            "release '1999-01-01' is unknown: there is no Census at s3://public/releases/1999-01-01" in unknown.stderr
        )
        assert project.command("release", "add", RELEASE).returncode == 0
        refused = project.materialize("tiny/obs_id_plan", RELEASE)
        assert refused.returncode != 0
        assert "is denied with the credentials of this environment" in refused.stderr
        assert "access to s3://the-store/some/prefix" in refused.stderr

        project.env["AWS_SECRET_ACCESS_KEY"] = key["SecretAccessKey"]
        planned = project.materialize("tiny/obs_id_plan", RELEASE)
        assert planned.returncode == 0, planned.stderr[-3000:]
        shards = [project.start_materialize("tiny/shard_embeddings", f"{RELEASE}|{i}") for i in range(2)]
        said = [shard.communicate() for shard in shards]
        assert [shard.wait() for shard in shards] == [0, 0], said
        done = project.materialize("tiny/embeddings_array", RELEASE)
        assert done.returncode == 0, done.stderr[-3000:]
        listed = project.command("inspect")
        assert "2/2 shards  60/60 cells" in listed.stdout, listed.stdout + listed.stderr

        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, project.env[name])
        with project.context("tiny") as context:
            stored = read_array(context.folder.array, project.folder, reader_config(private))
    written = [path for path in (project.folder / "dagster_home").rglob("*") if path.is_file()]
    assert any(RELEASE.encode() in path.read_bytes() for path in written)
    assert not [path for path in written if key["SecretAccessKey"].encode() in path.read_bytes()]

    local = Project(project.folder)
    with local.context("tiny") as context:
        make_plan(context)
    for shard in range(2):
        assert local.materialize("tiny/shard_embeddings", f"{RELEASE}|{shard}").returncode == 0
    expected = read_array(local.array("tiny"), project.folder)
    assert np.array_equal(stored.ids, np.arange(60))
    assert stored.stored_values == 60 * 16
    assert relative_errors(stored.values, expected.values).max() <= BOUND


def test_eight_writers_two_of_them_on_one_shard(project: Project, s3: str) -> None:
    on_s3(tiny(project, shards=7, megabatch_size=8), s3)
    with project.context("tiny") as context:
        make_plan(context)
        plan = read_plan(context.store, context.folder.plan)
        twice = len(plan.shard(3))
        workers = [start_worker(project, shard, "all") for shard in (*range(7), 3)]
        committed = [finish(worker) for worker in workers]
        assert committed == [len(plan.shard(shard)) for shard in (*range(7), 3)]
        summary = finish_array(context)
        assert (summary.fragments, summary.excess_fragments) == (plan.totals.megabatches + twice, twice)
        require_all_cells(context, s3, project.folder, 200)


def run_with_faults(project: Project, s3: str, seed: int) -> None:
    tiny(project, shards=2, megabatch_size=25)
    with s3_proxy(s3, project.folder, seed=seed, share=0.05) as proxy:
        on_s3(project, proxy.endpoint, f"store-{seed}")
        with project.context("tiny") as context:
            megabatches = make_plan(context).totals.megabatches
            committed = sum(finish(worker) for worker in [start_worker(project, shard) for shard in range(2)])
            summary = finish_array(context)
            assert committed == summary.fragments == megabatches
    on_s3(project, s3, f"store-{seed}")
    with project.context("tiny") as context:
        require_all_cells(context, s3, project.folder, 200)
    print(f"seed {seed}: {dict(proxy.counts)}")
    assert sum(proxy.counts.values()) - proxy.counts["requests"] > 0


@pytest.mark.parametrize("seed", [1, 2])
def test_requests_that_fail_are_tried_again(project: Project, s3: str, seed: int) -> None:
    run_with_faults(project, s3, seed)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(20))
def test_requests_that_fail_are_tried_again_twenty_times(project: Project, s3: str, seed: int) -> None:
    run_with_faults(project, s3, 100 + seed)


def outage(project: Project, s3: str, kind: str, patience: float) -> None:
    """Cut off a store in the middle of a shard; the shard fails, and finishes after the store is back."""
    tiny(project, shards=1, megabatch_size=10)
    with s3_proxy(s3, project.folder) as proxy:
        on_s3(project, proxy.endpoint)
        with project.context("tiny") as context:
            make_plan(context)
            array = EmbeddingsArray.open(context.folder.array, context.store, context.identity)
            worker = start_worker(project, 0)
            assert worker.stdout.readline().startswith("committed")
            proxy.outage.write_text(kind)
            began = time.monotonic()
            _, errors = worker.communicate()
            print(f"{kind}: failed after {time.monotonic() - began:.0f} s")
            assert time.monotonic() - began < patience
            assert worker.returncode != 0
            assert "StoreError" in errors
            assert "Expected a writable store: run this again" in errors
            proxy.outage.unlink()
            there = len(array.fragments())
            assert 1 <= there < 20
            assert finish(start_worker(project, 0)) == 20 - there
            assert finish_array(context).fragments == 20
            require_all_cells(context, proxy.endpoint, project.folder, 200)


def test_a_total_outage_fails_clearly_and_a_later_run_completes(project: Project, s3: str) -> None:
    outage(project, s3, "500", patience=240)


@pytest.mark.soak
@pytest.mark.parametrize("kind", ["503", "reset", "timeout"])
def test_other_outages(project: Project, s3: str, kind: str) -> None:
    outage(project, s3, kind, patience=900)


def test_a_bucket_that_cannot_be_made(s3: str, tmp_path: Path) -> None:
    storage = Storage(S3Settings(REGION, s3))
    with pytest.raises(UserError, match=r"there is no bucket 'b' for s3://b/x, and it cannot be created"):
        storage.make_place("s3://b/x")
    storage.make_place("s3://a-bucket/x")
    storage.make_place("s3://a-bucket/y")
    assert [one["Name"] for one in client(s3).list_buckets()["Buckets"]] == ["a-bucket"]


def test_a_write_costs_the_same_however_many_fragments_there_are(s3: str, tmp_path: Path) -> None:
    here = Storage(S3Settings(REGION, s3))
    here.make_place("s3://a-store/x")
    identity = Identity("s3://x", "d", "o", None, 1, "census", "g", "c", "fp32", "bfloat16", 8)
    EmbeddingsArray.create("s3://a-store/x", here, identity, 100)

    cells = iter(range(100))

    def requests_of(writes: int) -> int:
        with s3_proxy(s3, tmp_path) as proxy:
            there = EmbeddingsArray("s3://a-store/x", Storage(S3Settings(REGION, proxy.endpoint)), (100, 8), 8)
            with there.writing() as write:
                for cell in islice(cells, writes):
                    write(np.array([cell]), value_of(np.array([cell]), 8))
        return proxy.counts["requests"]

    opened_early, early = requests_of(1), requests_of(9)
    requests_of(30)
    opened_late, late = requests_of(1), requests_of(9)
    # Opening asks three times for each fragment that is there: 39 more for each of these, and one between them.
    assert (opened_late - opened_early, late - early) == (3 * 40, 3 * 40)
    array = EmbeddingsArray.open("s3://a-store/x", here, identity)
    assert [fragment.first for fragment in array.fragments()] == [*range(50)]


ON_TMPFS = """
set -e
mount -t tmpfs -o size={size}k tmpfs {folder}/store
exec {python} -W ignore -m tests.store.test_s3 {folder}
"""


def disk_driver(folder: Path) -> None:
    """Fill a store until its disk is full, free space, and finish. This runs where the disk is mounted."""
    store = folder / "store"
    with Project(folder).context("tiny") as context:
        make_plan(context)
        plan = read_plan(context.store, context.folder.plan)
        array = EmbeddingsArray.open(context.folder.array, context.store, context.identity)
        filler = store / "filler"
        written = 0
        try:
            for ids in plan.read_ids(context.store, plan.megabatches):
                if written == 5:
                    with filler.open("wb") as file:
                        while file.write(b"x" * 4096):
                            file.flush()
                array.write(ids, value_of(ids, 16))
                written += 1
        except (StoreError, OSError) as error:
            print("full:", type(error).__name__, error)
        try:
            array.write(plan.read_ids(context.store, plan.megabatches)[5], value_of(np.arange(8), 16))
        except StoreError as error:
            print("full:", type(error).__name__, error)
        assert len(array.fragments()) == 5
        filler.unlink()
        fill(context)
        summary = finish_array(context)
        print("finished", summary.fragments - plan.totals.megabatches)
        subprocess.run(["mount", "-o", "remount,ro", str(store)], check=True)
        try:
            finish_array(context)
        except Exception as error:
            print("read-only:", type(error).__name__, error)
        try:
            array.write(np.arange(8), value_of(np.arange(8), 16))
        except StoreError as error:
            print("read-only:", type(error).__name__, error)
        stored = read_array(array.uri, folder)
        assert np.array_equal(stored.values, value_of(np.arange(200), 16))
        print("whole")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_full_disk_and_a_read_only_one(project: Project) -> None:
    tiny(project, megabatch_size=8)
    (project.folder / "store").mkdir()
    script = ON_TMPFS.format(size=2048, folder=project.folder, python=sys.executable)
    # The mount is seen only by the processes that start there.
    env = {name: value for name, value in project.env.items() if name != SERVERS}
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], cwd=REPOSITORY, env=env, capture_output=True, text=True
    )
    if "unshare failed" in done.stderr or "permission denied" in done.stderr:
        pytest.skip("mounting is not allowed here")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    print(done.stdout)
    assert "full: StoreError 8 cells could not be written" in done.stdout
    assert "finished 0" in done.stdout
    assert "read-only: StoreError the record could not be written to" in done.stdout
    assert "read-only: StoreError 8 cells could not be written" in done.stdout
    assert done.stdout.endswith("whole\n")


if __name__ == "__main__":
    disk_driver(Path(sys.argv[1]))
