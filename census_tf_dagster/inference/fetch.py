"""A local copy of a checkpoint on S3: fetched once a node, and verified each time before it is used.

Every version of the objects gets a folder of its own in the cache, so that nothing changes below a running shard.
"""

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from census_tf_dagster.errors import UserError
from census_tf_dagster.inference.digests import file_digest
from census_tf_dagster.io.names import is_local
from census_tf_dagster.io.s3 import S3Object
from census_tf_dagster.io.storage import Storage

DIGESTS = "sha256.json"
"""In a fetched folder: the SHA-256 of each file as it came. Written last, so a folder without it is not whole."""


def fetch(uri: str, storage: Storage, cache: Path) -> Path:
    """Return a local copy of the checkpoint folder or embedding file at `uri`; local ones are used in place.

    Parameters
    ----------
    uri
        A path, or an S3 prefix or object.
    storage
        How S3 is reached.
    cache
        Local folder that keeps copies from S3; several processes may share it. A copy is used again when the objects
        are the same (size and ETag) and each file's SHA-256 is still the one that it came with; that of a large file
        may be remembered (`digests`), and `prepare` takes it again before anything is computed.

    Raises
    ------
    UserError
        When a file is missing, or `cache` cannot be written.
    StoreError
        When S3 cannot be reached, or what came is not what S3 says it holds.
    """
    if is_local(uri):
        path = Path(uri.removeprefix("file://"))
        if not path.exists():
            raise UserError(f"{path} does not exist; expected a checkpoint as `transcriptformer download` makes it.")
        return path
    objects = _find_objects(uri, storage)
    version = json.dumps([uri, sorted((name, found.size, found.etag) for name, found in objects.items())])
    place = cache / "fetched" / hashlib.sha256(version.encode()).hexdigest()[:16]
    try:
        with _one_at_a_time(place):
            if not _is_whole(place, objects, cache):
                _download(uri, objects, storage, place, cache)
    except OSError as error:
        raise UserError(
            f"{uri} cannot be fetched into {cache} ({error}): free space there, or set CENSUS_TF_CACHE to a folder "
            "with some."
        ) from error
    return place / uri.rsplit("/", 1)[-1]


def _find_objects(uri: str, storage: Storage) -> dict[str, S3Object]:
    """Return what to fetch, by its path in the fetched folder."""
    basename = uri.rsplit("/", 1)[-1]
    if found := storage.find_object(uri):
        return {basename: found}
    names = ["config.json", "model_weights.pt"]
    # A key may hold what leaves a folder.
    names += [f"vocabs/{name}" for name in storage.file_sizes(f"{uri}/vocabs") if ".." not in name.split("/")]
    objects = {}
    for name in names:
        found = storage.find_object(f"{uri}/{name}")
        if found is None:
            raise UserError(f"{uri} has no {name}; expected a checkpoint as `transcriptformer download` makes it.")
        objects[f"{basename}/{name}"] = found
    return objects


def _is_whole(place: Path, objects: Mapping[str, S3Object], cache: Path) -> bool:
    try:
        digests = json.loads((place / DIGESTS).read_bytes())
        return all(file_digest(place / name, cache).hex() == digests[name] for name in objects)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def _download(uri: str, objects: Mapping[str, S3Object], storage: Storage, place: Path, cache: Path) -> None:
    folder = uri.rsplit("/", 1)[0]
    (place / DIGESTS).unlink(missing_ok=True)
    digests = {}
    for name, expected in objects.items():
        storage.download(f"{folder}/{name}", place / name, expected)
        digests[name] = file_digest(place / name, cache).hex()
    storage.write(str(place / DIGESTS), json.dumps(digests, indent=1).encode())


@contextmanager
def _one_at_a_time(place: Path) -> Iterator[None]:
    """Let the other shards of a node wait for the one that fetches; a process that dies lets go."""
    place.mkdir(parents=True, exist_ok=True)
    with (place / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
