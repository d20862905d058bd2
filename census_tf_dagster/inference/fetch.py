"""Makes a local copy of a checkpoint on S3: fetches it once per node, and verifies it each time before use.

Every version of the objects gets its own folder in the cache, so that no file changes while a shard uses it. Reading
the checkpoint belongs in `checkpoint`.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from census_tf_dagster.errors import UserError
from census_tf_dagster.inference.digests import file_digest
from census_tf_dagster.io.files import one_at_a_time
from census_tf_dagster.io.names import is_local
from census_tf_dagster.io.s3 import S3Object
from census_tf_dagster.io.storage import Storage

DIGESTS = "sha256.json"
"""File with the SHA-256 of each fetched file. It is written last, so a folder without it is incomplete."""


def fetch(uri: str, storage: Storage, cache: Path) -> Path:
    """Return a local copy of the checkpoint folder or embedding file at `uri`; a local `uri` is used in place.

    Parameters
    ----------
    uri
        A path, or an S3 prefix or object.
    storage
        The storage that reaches S3.
    cache
        Local folder that keeps copies from S3; several processes may share it. A copy is used again if the objects are
        the same (size and ETag) and each file still has the SHA-256 that it had when it was fetched. The digest of a
        large file may be remembered (`digests`); `prepare` computes it again before anything is computed.

    Raises
    ------
    UserError
        When a file is missing, or `cache` cannot be written.
    StoreError
        When S3 cannot be reached, or the fetched bytes differ from what S3 says it holds.
    """
    if is_local(uri):
        path = Path(uri.removeprefix("file://"))
        if not path.exists():
            raise UserError(
                f"{path} does not exist; expected a checkpoint folder as `transcriptformer download` makes it: correct "
                "`checkpoint`."
            )
        return path
    objects = _find_objects(uri, storage)
    version = json.dumps([uri, sorted((name, found.size, found.etag) for name, found in objects.items())])
    place = cache / "fetched" / hashlib.sha256(version.encode()).hexdigest()[:16]
    try:
        # The other shards of a node wait for the one that fetches.
        with one_at_a_time(place / ".lock"):
            if not _is_whole(place, objects, cache):
                _download(uri, objects, storage, place, cache)
    except OSError as error:
        raise UserError(
            f"{uri} cannot be fetched into {cache} ({error}). Expected a writable local folder with enough space: free "
            "space there, or set CENSUS_TF_CACHE to another folder."
        ) from error
    return place / uri.rsplit("/", 1)[-1]


def _find_objects(uri: str, storage: Storage) -> dict[str, S3Object]:
    """Return the objects to fetch, by their path in the fetched folder."""
    basename = uri.rsplit("/", 1)[-1]
    if found := storage.find_object(uri):
        return {basename: found}
    names = ["config.json", "model_weights.pt"]
    # A key with ".." could lead out of the folder.
    names += [f"vocabs/{name}" for name in storage.file_sizes(f"{uri}/vocabs") if ".." not in name.split("/")]
    objects = {}
    for name in names:
        found = storage.find_object(f"{uri}/{name}")
        if found is None:
            raise UserError(
                f"{uri} has no {name}; expected a checkpoint folder as `transcriptformer download` makes it: correct "
                "`checkpoint`, or upload the file."
            )
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
