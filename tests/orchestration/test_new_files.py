"""The sensor of a set of files: which files it adds, and when. `test_auto_start` lets a real daemon run it."""

from pathlib import Path

import dagster as dg
import pytest

from census_tf_dagster.embedding_set import FileSet
from census_tf_dagster.orchestration.resources import StoreResource
from census_tf_dagster.orchestration.sensors import new_files
from census_tf_dagster.orchestration.sensors.new_files import build_new_files, look_at_files
from tests.support.moto_servers import REGION, client, upload


def test_a_file_is_added_when_it_no_longer_changes() -> None:
    first = look_at_files({"a.h5ad": "1"}, {})
    assert not first.add
    assert "still being written" in first.notes[0]
    growing = look_at_files({"a.h5ad": "2"}, first.cursor)
    assert not growing.add
    settled = look_at_files({"a.h5ad": "2"}, growing.cursor)
    assert settled.add == {"a.h5ad": "2"}
    assert not look_at_files({"a.h5ad": "2"}, settled.cursor).add
    # Other content under the same name is embedded as well, once it is there.
    changing = look_at_files({"a.h5ad": "3"}, settled.cursor)
    assert not changing.add
    changed = look_at_files({"a.h5ad": "3"}, changing.cursor)
    assert changed.add == {"a.h5ad": "3"}
    gone = look_at_files({}, changed.cursor)
    assert (gone.add, gone.cursor) == ({}, {})
    assert gone.notes == ("1 files are gone; their partitions and arrays stay: a.h5ad",)


def test_names_that_are_no_partition_are_named() -> None:
    versions = {"my cells.h5ad": "1", ".hidden.h5ad": "1", "a.h5ad": "1"}
    found = look_at_files(versions, look_at_files(versions, {}).cursor)
    assert list(found.add) == ["a.h5ad"]
    assert "2 files are not embedded, because of their names" in " ".join(found.notes)
    assert "rename them): 'my cells.h5ad', '.hidden.h5ad'" in " ".join(found.notes)


def test_many_files_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(new_files, "MOST_ADDED", 3)
    versions = {f"{i}.h5ad": "1" for i in range(7)}
    cursor = look_at_files(versions, {}).cursor
    added: list[str] = []
    for expected in (3, 3, 1, 0):
        found = look_at_files(versions, cursor)
        cursor = found.cursor
        assert len(found.add) == expected
        added += found.add
    assert sorted(added) == sorted(versions)


def look(
    instance: dg.DagsterInstance, store: StoreResource, files: str, cursor: str | None, auto_start: str = "on"
) -> dg.SensorResult:
    settings = FileSet(name="lab", files=files, checkpoint="/models/tf", device="cpu", auto_start=auto_start).placed()
    context = dg.build_sensor_context(instance, cursor=cursor, resources={"store": store})
    result = build_new_files(settings)(context)
    assert isinstance(result, dg.SensorResult)
    return result


@pytest.mark.parametrize("place", ["local", "s3"])
def test_what_is_a_file(place: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    lab = tmp_path / "lab"
    for name in (
        "a.h5ad",
        "b.zarr/zarr.json",
        "c.zarr/.zgroup",
        "d/__tiledb_group.tdb",
        "e/x.h5ad",
        "f.csv",
        "g.h5ad/h",
    ):
        (lab / name).parent.mkdir(parents=True, exist_ok=True)
        (lab / name).write_text("content")
    store, files = StoreResource(location=str(tmp_path / "store")), str(lab)
    if place == "s3":
        endpoint = request.getfixturevalue("s3")
        upload(lab, endpoint, "looked-at", "lab")
        store, files = StoreResource(location="x", s3_region=REGION, s3_endpoint=endpoint), "s3://looked-at/lab"
    with dg.DagsterInstance.ephemeral() as instance:
        first = look(instance, store, files, None)
        assert not first.run_requests
        second = look(instance, store, files, first.cursor)
        assert [one.partition_key for one in second.run_requests] == ["a.h5ad", "b.zarr", "c.zarr", "d"]
        (request_to_add,) = second.dynamic_partitions_requests
        assert (request_to_add.partitions_def_name, len(request_to_add.partition_keys)) == ("lab_files", 4)
        # A set that a person starts only gets its partitions.
        only_added = look(instance, store, files, first.cursor, auto_start="off")
        assert not only_added.run_requests
        assert only_added.dynamic_partitions_requests
        if place == "s3":
            client(endpoint).put_object(Bucket="looked-at", Key="lab/c.zarr/0", Body=b"more")
        else:
            (lab / "c.zarr" / "0").write_text("more")
        instance.add_dynamic_partitions("lab_files", list(request_to_add.partition_keys))
        third = look(instance, store, files, second.cursor)
        assert not third.run_requests
        fourth = look(instance, store, files, third.cursor)
        assert [one.partition_key for one in fourth.run_requests] == ["c.zarr"]
        assert not fourth.dynamic_partitions_requests


def test_a_folder_that_is_missing_or_not_reached_says_so(tmp_path: Path) -> None:
    store = StoreResource(location=str(tmp_path), s3_region=REGION, s3_endpoint="http://127.0.0.1:9")
    with dg.DagsterInstance.ephemeral() as instance:
        missing = look(instance, store, str(tmp_path / "nowhere"), '{"a.h5ad": {"seen": "1", "added": "1"}}')
        assert "nowhere does not exist; expected the folder with the files" in str(missing.skip_reason)
        # The cursor stays, so that nothing is computed again when the folder is back.
        assert missing.cursor is None
