"""Local folders and S3 prefixes list the same files; failing writes, reads and memory give one clear error."""

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from census_tf_dagster.census.plan import read_plan
from census_tf_dagster.errors import UserError
from census_tf_dagster.inference.checkpoint import read_checkpoint
from census_tf_dagster.inference.checkpoint_cache import prepare
from census_tf_dagster.io.s3 import S3Settings
from census_tf_dagster.io.storage import Storage
from census_tf_dagster.pipeline.plan_release import make_plan
from census_tf_dagster.store.inventory import inspect_store
from tests.support.builders import tiny
from tests.support.moto_servers import REGION, client
from tests.support.on_s3 import on_s3
from tests.support.project import REPOSITORY, Project

FILES = {"a": b"1", "b/c": b"22", "b/d/e": b"", "b/d/f": b"333"}
MARKERS = ("", "b/", "b/d/", "b/d/empty/", "empty/")


def fill_local(root: Path) -> str:
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    for name in MARKERS:
        (root / name).mkdir(parents=True, exist_ok=True)
    return str(root)


def fill_s3(objects: Any) -> str:
    objects.create_bucket(Bucket="a-store")
    for name, content in {**FILES, **dict.fromkeys(MARKERS, b"")}.items():
        objects.put_object(Bucket="a-store", Key=f"some/place/{name}", Body=content)
    # This name begins with the same letters but is another folder.
    objects.put_object(Bucket="a-store", Key="some/place2/a", Body=b"4444")
    return "s3://a-store/some/place"


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_what_is_listed(kind: str, s3: str, tmp_path: Path) -> None:
    storage = Storage(S3Settings(REGION, s3))
    uri = fill_local(tmp_path / "place") if kind == "local" else fill_s3(client(s3))
    assert storage.file_sizes(uri) == {name: len(content) for name, content in FILES.items()}
    assert storage.file_sizes(f"{uri}/b") == {"c": 2, "d/e": 0, "d/f": 3}
    assert storage.file_sizes(f"{uri}/nowhere") == {}
    assert storage.list(uri) == [f"{uri}/a", f"{uri}/b", f"{uri}/empty"]
    assert storage.list(f"{uri}/b/d") == [f"{uri}/b/d/e", f"{uri}/b/d/empty", f"{uri}/b/d/f"]
    assert storage.list(f"{uri}/nowhere") == []
    assert storage.is_folder(f"{uri}/b")
    assert storage.holds_files(f"{uri}/b")
    assert not storage.holds_files(f"{uri}/empty")
    assert not storage.holds_files(f"{uri}/b/d/empty")
    assert storage.last_written(f"{uri}/b") > 1e9
    assert storage.last_written(f"{uri}/empty") == 0
    assert storage.size(uri) == sum(map(len, FILES.values()))
    storage.remove_folder(f"{uri}/b")
    assert storage.file_sizes(uri) == {"a": 1}


def test_a_listing_of_many_pages(s3: str) -> None:
    objects = client(s3)
    objects.create_bucket(Bucket="a-store")
    for i in range(9):
        objects.put_object(Bucket="a-store", Key=f"p/{i}/", Body=b"")
    storage = Storage(S3Settings(REGION, s3))

    def two_at_once(params: dict[str, Any], **_: object) -> None:
        params["MaxKeys"] = 2

    storage._objects._client.meta.events.register("before-parameter-build.s3.ListObjectsV2", two_at_once)
    assert not storage.holds_files("s3://a-store/p")
    objects.put_object(Bucket="a-store", Key="p/last", Body=b"1")
    assert storage.holds_files("s3://a-store/p")
    assert storage.file_sizes("s3://a-store/p") == {"last": 1}
    assert len(storage.list("s3://a-store/p")) == 10


def test_a_store_in_which_the_console_made_every_folder(project: Project, s3: str) -> None:
    tiny(project)
    on_s3(project, s3)
    objects = client(s3)
    objects.create_bucket(Bucket="the-store")
    with project.context("tiny") as context:
        parts = context.folder.array.removeprefix("s3://the-store/").split("/")
        for depth in range(1, len(parts) + 1):
            objects.put_object(Bucket="the-store", Key="/".join(parts[:depth]) + "/", Body=b"")
        make_plan(context)
        (holding,) = inspect_store(context.folder.store, context.store)
        assert (holding.state, holding.cells_planned, holding.identity) == ("unverified", 200, parts[-2])


def test_a_folder_of_temporary_files_that_cannot_be_used(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client(s3).create_bucket(Bucket="a-store")
    monkeypatch.setattr(tempfile, "tempdir", "/proc/nowhere")
    with (
        pytest.raises(UserError, match=r"no temporary folder can be made .*: set TMPDIR to one"),
        Storage(S3Settings(REGION, s3)).writing("s3://a-store/x"),
    ):
        pass


def told(about: str, attempt: Callable[[], object]) -> None:
    """Print the outcome of an attempt."""
    try:
        print(about, "done", attempt())
    except UserError as error:
        print(about, "refused:", error)


def on_a_small_disk(project: Project) -> None:
    """Plan on a read-only, a full and a writable disk; prepare in a read-only cache."""
    store = project.folder / "store"
    with project.context("tiny") as context:
        make_plan(context)
        filler = store / "filler"
        with filler.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(b"x" * 4096)
        told("full: plan", lambda: make_plan(context))
        filler.unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(store)], check=True)
        told("read-only: plan", lambda: make_plan(context))
        plan = read_plan(context.store, context.folder.plan)
        told("read-only: ids", lambda: sum(map(len, plan.read_ids(context.store, plan.megabatches))))
        told("read-only: remove", lambda: context.store.remove_folder(context.folder.root))
    (project.folder / "cache").mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(project.folder / "cache")], check=True)
    checkpoint = read_checkpoint(project.checkpoint, cache=project.folder / "cache")
    told("read-only: prepare", lambda: prepare(checkpoint, "fp32", project.folder / "cache"))
    subprocess.run(["mount", "-o", "remount,size=40k", str(project.folder / "cache")], check=True)
    subprocess.run(["mount", "-o", "remount,rw", str(project.folder / "cache")], check=True)
    told("full: prepare", lambda: prepare(checkpoint, "fp32", project.folder / "cache"))
    print("left behind:", [path.name for path in project.folder.glob("cache/prepared/*")])


def with_little_memory(project: Project) -> None:
    """Plan in a process whose memory is limited."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    for megabytes in (50, 500, 900):
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + megabytes * 2**20, -1))

        def plan() -> None:
            with project.context("tiny") as context:
                make_plan(context)

        told(f"{megabytes} MB: plan", plan)


def driven(project: Project, *command: str) -> str:
    line = [*command, sys.executable, "-W", "ignore", "-m", "tests.io.test_storage", str(project.folder)]
    done = subprocess.run(line, cwd=REPOSITORY, env=project.env, capture_output=True, text=True)
    if "unshare failed" in done.stderr or "permission denied" in done.stderr:
        pytest.skip("mounting is not allowed here")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_disks_that_are_full_or_read_only(project: Project) -> None:
    tiny(project)
    (project.folder / "store").mkdir()
    mount = f'mount -t tmpfs -o size=2048k tmpfs {project.folder}/store && exec "$@" disk'
    said = driven(project, "unshare", "--mount", "sh", "-c", mount, "sh")
    assert "full: plan refused: " in said
    assert said.count("cannot be written (No space left on device): make the store writable, and free space") == 1
    assert "read-only: plan refused: " in said
    assert said.count("cannot be written (Read-only file system): make the store writable") == 1
    assert "read-only: ids done 200" in said
    assert "cannot be removed" in said
    assert "read-only: prepare refused: the prepared checkpoint cannot be written below" in said
    assert "full: prepare refused: the prepared checkpoint cannot be written below" in said
    assert said.count("or set CENSUS_TF_CACHE to another folder") == 2
    assert said.endswith("left behind: []\n")


def test_a_limit_of_memory(project: Project) -> None:
    tiny(project)
    said = driven(project)
    assert said.count("refused: this process got no more memory (") == 3, said
    assert "raise its limit (`ulimit -v`" in said


if __name__ == "__main__":
    if sys.argv[2:] == ["disk"]:
        on_a_small_disk(Project(Path(sys.argv[1])))
    else:
        with_little_memory(Project(Path(sys.argv[1])))
