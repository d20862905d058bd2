"""A deployment's variables: an invalid one is refused in one line that names it and shows no password."""

import re
from pathlib import Path

import pytest

from census_tf_dagster.definitions import census_resource, sets_folder, store_resource
from census_tf_dagster.errors import UserError
from census_tf_dagster.io.names import normalise

ODD_LOCATIONS = {
    "": "is ''. It is empty",
    "gs://bucket/a": "is 'gs://bucket/a'. Expected a path, or s3://BUCKET/PREFIX with s3 in small letters",
    "S3://bucket/a": "s3 in small letters",
    "s3:/bucket/a": "two slashes",
    "https://bucket.s3.amazonaws.com/a": "Expected a path, or s3://BUCKET/PREFIX",
    "s3://": "a bucket's name of 3 to 63 characters",
    "s3:///a": "a bucket's name of 3 to 63 characters",
    "s3://bucket//a": "single slashes",
    "file://relative": "file:/// followed by an absolute path",
    " /data": "has a space at its start or end",
    "/data\n": "control character or line break",
    "/da\x00ta": "control character or line break",
    "/data/" + "x" * 10_000: "It has 10006 characters. Expected at most 1024",
    "~nobody-of-this-name/data": "The user after ~ is unknown",
}


@pytest.mark.parametrize("text", ODD_LOCATIONS)
@pytest.mark.parametrize("name", ["CENSUS_TF_SETS", "CENSUS_TF_CENSUS", "CENSUS_TF_STORE", "CENSUS_TF_CACHE"])
def test_an_odd_location(name: str, text: str) -> None:
    with pytest.raises(UserError) as caught:
        {"CENSUS_TF_SETS": sets_folder, "CENSUS_TF_CENSUS": census_resource}.get(name, store_resource)({name: text})
    told = str(caught.value)
    assert told.startswith(f"{name} is ")
    assert ODD_LOCATIONS[text] in told
    assert "\n" not in told
    assert len(told) < 300


@pytest.mark.parametrize("text", ["/data/{release}/{x}", "/data/{", "s3://bucket/{{release}}", "/data/{0.__class__}"])
def test_a_brace_in_the_census_location(text: str) -> None:
    with pytest.raises(UserError, match=r"^CENSUS_TF_CENSUS is .*Only \{release\} is replaced"):
        census_resource({"CENSUS_TF_CENSUS": text})


def test_locations_that_are_right(tmp_path: Path) -> None:
    assert store_resource({"CENSUS_TF_STORE": "~/store/"}).uri() == str(Path.home() / "store")
    assert store_resource({"CENSUS_TF_STORE": "s3://bucket/a b//"}).uri() == "s3://bucket/a b"
    assert sets_folder({"CENSUS_TF_SETS": f"file://{tmp_path}"}) == tmp_path
    assert normalise("~") == str(Path.home())
    (tmp_path / "2025-11-08" / "2025-11-08").mkdir(parents=True)
    census = census_resource({"CENSUS_TF_CENSUS": f"{tmp_path}/{{release}}/{{release}}/"})
    assert census.uri("2025-11-08") == f"{tmp_path}/2025-11-08/2025-11-08"


def test_a_cache_on_s3() -> None:
    with pytest.raises(UserError, match=r"^CENSUS_TF_CACHE is 's3://bucket/cache'\. Expected a folder of this machine"):
        store_resource({"CENSUS_TF_CACHE": "s3://bucket/cache"})


@pytest.mark.parametrize("place", ["STORE", "CENSUS"])
@pytest.mark.parametrize(
    "text", ["http://ada:hunter2@host:9000", "ada:hunter2@host", "http://hunter2@host/?x=hunter2", "host:9000?hunter2"]
)
def test_an_endpoint_with_a_password(place: str, text: str) -> None:
    name = f"CENSUS_TF_{place}_S3_ENDPOINT"
    with pytest.raises(UserError, match=rf"^{name} is .*put credentials in AWS's own settings\.$") as caught:
        (store_resource if place == "STORE" else census_resource)({name: text})
    assert "hunter2" not in str(caught.value)


def test_a_directory_with_a_password() -> None:
    with pytest.raises(UserError, match=re.escape("is 'https://***@host/release.json'. Expected http(s)://HOST/PATH")):
        census_resource({"CENSUS_TF_CENSUS_DIRECTORY": "https://ada:hunter2@host/release.json"})


def test_other_variables() -> None:
    with pytest.raises(UserError, match=r"CENSUS_TF_CENSUS_S3_SIGNED is 'true'. Expected 1 or 0"):
        census_resource({"CENSUS_TF_CENSUS_S3_SIGNED": "true"})
    with pytest.raises(UserError, match=r"CENSUS_TF_STORE_S3_REGION is 'us west\?'. Expected an AWS region"):
        store_resource({"CENSUS_TF_STORE_S3_REGION": "us west\n"})
    assert census_resource({"CENSUS_TF_CENSUS_S3_SIGNED": "1"}).s3_anonymous is False
    assert census_resource({}).s3_anonymous is True
    assert store_resource({"CENSUS_TF_STORE_S3_ENDPOINT": "http://[::1]:9000"}).s3_endpoint == "http://[::1]:9000"
