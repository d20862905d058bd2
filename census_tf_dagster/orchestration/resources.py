"""Where the Census and the store are. Sets say what to embed; these say where."""

from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg

from census_tf_dagster.errors import UserError
from census_tf_dagster.io.names import is_local, normalise, require_name

if TYPE_CHECKING:
    from census_tf_dagster.census.directory import ListedRelease
    from census_tf_dagster.io.storage import Storage

PUBLIC = "public"


class CensusResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Which Census a release name means.

    Attributes
    ----------
    location
        ``public``: releases of the CELLxGENE Census by their names (2025-11-08), read without an account.
        Otherwise a path or S3 prefix with ``{release}`` in it.
    directory
        Address of the directory that lists public releases; empty: where cellxgene_census looks.
    s3_region, s3_endpoint, s3_anonymous
        How S3 is reached. The default suits the public Census. Where the directory says in which region a release
        is, that one counts.
    """

    location: str = PUBLIC
    directory: str = ""
    s3_region: str = "us-west-2"
    s3_endpoint: str = ""
    s3_anonymous: bool = True

    @property
    def is_public(self) -> bool:
        """Whether releases are those of the public directory."""
        return self.location == PUBLIC

    def listed(self, release: str) -> "ListedRelease | None":
        """Return what the public directory says of a release; None for a Census of the deployment's own.

        Raises
        ------
        UserError
            When it lists no such release.
        """
        if not self.is_public:
            return None
        from census_tf_dagster.census.directory import read_directory

        directory = read_directory(self.directory)
        found = directory.find(release)
        if found is None:
            wrong = [text for text in directory.malformed if text.startswith(f"{release}:")]
            names = ", ".join(one.name for one in directory.releases[:5])
            raise UserError(
                f"release {release!r} is not in the public Census directory; the last ones are {names}."
                + (f" Its entry is malformed: {wrong[0]}" if wrong else "")
            )
        return found

    def uri(self, release: str) -> str:
        """Resolve a release name, as `place` does."""
        return self.place(release)[0]

    def place(self, release: str) -> "tuple[str, Storage]":
        """Resolve a release name: where its Census is, and read access to it.

        Raises
        ------
        UserError
            When there is no such release.
        """
        require_name(release, "release")
        if listed := self.listed(release):
            return listed.uri, self._storage(listed.s3_region or self.s3_region)
        if "{release}" not in self.location:
            raise UserError(f"the Census location {self.location!r} must be 'public' or contain '{{release}}'.")
        uri = normalise(self.location.replace("{release}", release))
        storage = self._storage(self.s3_region)
        there = Path(uri.removeprefix("file://")).is_dir() if is_local(uri) else storage.is_folder(uri)
        if not there:
            raise UserError(
                f"release {release!r} is unknown: there is no Census at {uri}. CENSUS_TF_CENSUS says where."
            )
        return uri, storage

    def _storage(self, region: str) -> "Storage":
        from census_tf_dagster.io.s3 import S3Settings
        from census_tf_dagster.io.storage import Storage

        return Storage(S3Settings(region, self.s3_endpoint, self.s3_anonymous))


class StoreResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Where plans and arrays are kept.

    Attributes
    ----------
    location
        A folder or S3 prefix; made when it does not exist.
    s3_region, s3_endpoint
        How S3 is reached; credentials come from the environment or the role.
    cache
        Local folder for checkpoints fetched from S3.
    """

    location: str
    s3_region: str = ""
    s3_endpoint: str = ""
    cache: str = "~/.cache/census-tf-dagster"

    def uri(self) -> str:
        """Return the store's location, a local one as an absolute path."""
        return normalise(self.location)

    def storage(self) -> "Storage":
        """Return read and write access to the store."""
        from census_tf_dagster.io.s3 import S3Settings
        from census_tf_dagster.io.storage import Storage

        return Storage(S3Settings(self.s3_region, self.s3_endpoint))

    def cache_folder(self) -> Path:
        """Return the local cache folder."""
        return Path(self.cache).expanduser()
