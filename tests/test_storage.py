"""One kind of place, two kinds of storage: both list the same files, whatever marks folders on S3."""

from pathlib import Path
from typing import Any

import pytest

from census_tf_dagster.operate.contents import inspect_store
from census_tf_dagster.s3 import S3Settings
from census_tf_dagster.steps.planning import make_plan
from census_tf_dagster.storage import Storage
from tests.builders import tiny
from tests.moto_servers import REGION, client
from tests.support import Project
from tests.test_s3 import on_s3

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
    # Begins with the same letters, and is another folder.
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
    with project.job("tiny") as job:
        parts = job.folder.array.removeprefix("s3://the-store/").split("/")
        for depth in range(1, len(parts) + 1):
            objects.put_object(Bucket="the-store", Key="/".join(parts[:depth]) + "/", Body=b"")
        make_plan(job)
        (holding,) = inspect_store(job.folder.store, job.store)
        assert (holding.state, holding.cells_planned, holding.identity) == ("unproved", 200, parts[-2])
