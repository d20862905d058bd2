"""Checkpoints on S3 are fetched once, verified each time, and never mixed."""

import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import boto3
import pytest
from boto3.s3.transfer import TransferConfig

from census_tf_dagster.definitions import store_resource
from census_tf_dagster.demo.checkpoint import build_checkpoint
from census_tf_dagster.errors import StoreError, UserError
from census_tf_dagster.inference.checkpoint import read_checkpoint
from census_tf_dagster.inference.fetch import DIGESTS, fetch
from census_tf_dagster.io.s3 import S3Objects, S3Settings
from census_tf_dagster.io.storage import Storage
from tests.support.builders import tiny
from tests.support.project import Project

URI = "s3://models/tf/c"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    genes = [f"ENSG{i:011d}" for i in range(30)]
    build_checkpoint(tmp_path / "c", {"x": genes}, ["a", "b"], embed_dim=16, seq_len=63, block_len=64)
    return tmp_path / "c"


@pytest.fixture
def client(folder: Path, s3: str) -> Any:
    client = boto3.client("s3", endpoint_url=s3, region_name="us-east-1")
    client.create_bucket(Bucket="models")
    for file in folder.rglob("*.*"):
        client.upload_file(str(file), "models", f"tf/c/{file.relative_to(folder)}")
    return client


@pytest.fixture
def storage(s3: str, client: Any) -> Storage:
    return Storage(S3Settings("us-east-1", s3))


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the downloaded objects."""
    found: list[str] = []
    real = S3Objects.download

    def download(self: S3Objects, uri: str, *arguments: Any) -> None:
        found.append(uri.removeprefix(f"{URI}/"))
        real(self, uri, *arguments)

    monkeypatch.setattr(S3Objects, "download", download)
    return found


def test_a_prefix_is_fetched_once(folder: Path, tmp_path: Path, storage: Storage, downloads: list[str]) -> None:
    local = fetch(URI, storage, tmp_path / "cache")
    assert read_checkpoint(local).fingerprint == read_checkpoint(folder).fingerprint
    assert sorted(downloads) == ["config.json", "model_weights.pt", "vocabs/assay_vocab.json", "vocabs/x_gene.h5"]
    assert fetch(URI, storage, tmp_path / "cache") == local
    assert len(downloads) == 4


def test_folders_in_the_prefix(folder: Path, tmp_path: Path, client: Any, storage: Storage) -> None:
    for key in ("", "vocabs/", "vocabs/old/", "vocabs/empty/", "vocabs/old/../../../../out"):
        client.put_object(Bucket="models", Key=f"tf/c/{key}", Body=b"")
    client.put_object(Bucket="models", Key="tf/c/vocabs/old/assay_vocab.json", Body=b"{}")
    local = fetch(URI, storage, tmp_path / "cache")
    assert read_checkpoint(local).fingerprint == read_checkpoint(folder).fingerprint
    assert (local / "vocabs" / "old" / "assay_vocab.json").read_bytes() == b"{}"
    assert not (tmp_path / "cache" / "fetched" / "out").exists()


def test_a_single_file(folder: Path, tmp_path: Path, storage: Storage) -> None:
    local = fetch(f"{URI}/vocabs/x_gene.h5", storage, tmp_path / "cache")
    assert local.name == "x_gene.h5"
    assert local.read_bytes() == (folder / "vocabs" / "x_gene.h5").read_bytes()


def test_what_is_not_there_is_named(tmp_path: Path, storage: Storage) -> None:
    with pytest.raises(UserError, match=r"s3://models/tf/d has no config.json"):
        fetch("s3://models/tf/d", storage, tmp_path / "cache")


def test_another_version_gets_a_folder_of_its_own(tmp_path: Path, client: Any, storage: Storage) -> None:
    first = fetch(URI, storage, tmp_path / "cache")
    before = (first / "config.json").read_bytes()
    # The new object has the same size.
    client.put_object(Bucket="models", Key="tf/c/config.json", Body=before.replace(b"model", b"MODEL"))
    second = fetch(URI, storage, tmp_path / "cache")
    assert (second / "config.json").read_bytes() == before.replace(b"model", b"MODEL")
    assert (first / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    "harm", ["flipped", "flipped, times kept", "cut short", "removed", "no digests", "digests cut short"]
)
def test_a_copy_that_was_harmed_is_fetched_again(
    folder: Path, tmp_path: Path, storage: Storage, downloads: list[str], harm: str
) -> None:
    local = fetch(URI, storage, tmp_path / "cache")
    downloads.clear()
    weights, digests = local / "model_weights.pt", local.parent / DIGESTS
    content, state = weights.read_bytes(), weights.stat()
    match harm:
        case "flipped" | "flipped, times kept":
            weights.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
            if harm != "flipped":
                os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))
        case "cut short":
            weights.write_bytes(content[:1000])
        case "removed":
            weights.unlink()
        case "no digests":
            digests.unlink()
        case _:
            digests.write_bytes(digests.read_bytes()[:40])
    assert fetch(URI, storage, tmp_path / "cache") == local
    assert len(downloads) == 4
    assert weights.read_bytes() == (folder / "model_weights.pt").read_bytes()


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "in parts"])
def test_what_came_is_compared_with_the_md5_of_s3(
    tmp_path: Path, client: Any, storage: Storage, monkeypatch: pytest.MonkeyPatch, parts: bool
) -> None:
    content = bytes(range(256)) * 48 * 1024  # 12 MiB
    (tmp_path / "big").write_bytes(content)
    size = 5 * 2**20 if parts else 2**30
    transfer = TransferConfig(multipart_threshold=size, multipart_chunksize=size)
    client.upload_file(str(tmp_path / "big"), "models", "big.h5", Config=transfer)
    found = storage.find_object("s3://models/big.h5")
    assert found is not None
    assert found.etag.endswith("-3") == parts
    storage.download("s3://models/big.h5", tmp_path / "whole", found)
    assert (tmp_path / "whole").read_bytes() == content

    def corrupt(bucket: str, key: str, path: str) -> None:
        Path(path).write_bytes(content[:-1] + b"?")

    monkeypatch.setattr(storage._objects._client, "download_file", corrupt)
    with pytest.raises(StoreError, match=r"big.h5: the copy has the MD5 .*; expected .*, as S3 states"):
        storage.download("s3://models/big.h5", tmp_path / "corrupt", found)
    assert not (tmp_path / "corrupt").exists()


def test_a_short_answer_and_a_change_meanwhile(
    tmp_path: Path, client: Any, storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"{URI}/config.json"
    found = storage.find_object(uri)
    assert found is not None
    with monkeypatch.context() as patch:
        patch.setattr(storage._objects._client, "download_file", lambda bucket, key, path: Path(path).write_bytes(b"?"))
        with pytest.raises(StoreError, match=rf"1 bytes came; expected {found.size}"):
            storage.download(uri, tmp_path / "short", found)
    client.put_object(Bucket="models", Key="tf/c/config.json", Body=b"{}")
    with pytest.raises(StoreError, match=r"config.json changed while it was fetched"):
        storage.download(uri, tmp_path / "changed", found)
    assert not list(tmp_path.glob("*short*")) + list(tmp_path.glob("*changed*"))


def test_shards_of_one_node_fetch_once(tmp_path: Path, storage: Storage, downloads: list[str]) -> None:
    threads = [threading.Thread(target=fetch, args=(URI, storage, tmp_path / "cache")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(downloads) == 4


def test_a_cache_that_cannot_be_written(tmp_path: Path, storage: Storage) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match=r"cannot be fetched into .*cache .*set CENSUS_TF_CACHE"):
        fetch(URI, storage, tmp_path / "cache")


def test_the_deployment_names_the_cache() -> None:
    assert store_resource({"CENSUS_TF_CACHE": "/var/cache/x"}).cache_folder() == Path("/var/cache/x")
    assert store_resource({}).cache_folder() == Path.home() / ".cache" / "census-tf-dagster"


def test_a_set_that_expects_another_checkpoint(project: Project) -> None:
    tiny(project)
    right = read_checkpoint(project.checkpoint).fingerprint
    wrong = hashlib.sha256(b"another").hexdigest()
    project.add_set("right", organism="homo_sapiens", checkpoint_fingerprint=right)
    project.add_set("wrong", organism="homo_sapiens", checkpoint_fingerprint=wrong)
    with project.context("right") as context:
        assert context.checkpoint.fingerprint == right
    with (
        pytest.raises(UserError, match=rf"has the fingerprint {right}; the set wrong expects {wrong}"),
        project.context("wrong"),
    ):
        pass
