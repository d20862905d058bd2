"""The Dagster resources of a deployment: where the Census and the store are. What to embed belongs to the sets."""

from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg

from census_tf_dagster.errors import UserError
from census_tf_dagster.io.names import is_local, normalise, require_name

if TYPE_CHECKING:
    from census_tf_dagster.census.directory import ListedRelease
    from census_tf_dagster.io.storage import Storage

PUBLIC = "public"
"""The location that means the public CELLxGENE Census."""


class CensusResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The Census of a deployment: finds a release by its name.

    Attributes
    ----------
    location
        ``public``: the releases of the CELLxGENE Census, by name (2025-11-08), which need no account.
        Otherwise a path or S3 prefix that contains ``{release}``.
    directory
        Address of the directory that lists public releases; empty: the one of cellxgene_census.
    s3_region, s3_endpoint, s3_anonymous
        How to reach S3. The defaults are for the public Census. If the directory gives the region of a release, that
        region is used.
    """

    location: str = PUBLIC
    directory: str = ""
    s3_region: str = "us-west-2"
    s3_endpoint: str = ""
    s3_anonymous: bool = True

    @property
    def is_public(self) -> bool:
        """Whether the releases are those of the public directory."""
        return self.location == PUBLIC

    def listed(self, release: str) -> "ListedRelease | None":
        """Return the entry of a release in the public directory; None when the deployment has its own Census.

        Raises
        ------
        UserError
            When the directory does not list the release.
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
                f"release {release!r} is not in the public Census directory; expected one of its releases (the last "
                f"are {names}). Correct the name." + (f" Its entry is malformed: {wrong[0]}" if wrong else "")
            )
        return found

    def uri(self, release: str) -> str:
        """Return the location of a release, as `place` finds it."""
        return self.place(release)[0]

    def place(self, release: str) -> "tuple[str, Storage]":
        """Return the location of a release, and read access to it.

        Raises
        ------
        UserError
            When there is no such release.
        """
        require_name(release, "release")
        if listed := self.listed(release):
            return listed.uri, self._storage(listed.s3_region or self.s3_region)
        if "{release}" not in self.location:
            raise UserError(
                f"the Census location is {self.location!r}; expected 'public', or a location that contains "
                "'{release}'. Correct CENSUS_TF_CENSUS."
            )
        uri = normalise(self.location.replace("{release}", release))
        storage = self._storage(self.s3_region)
        there = Path(uri.removeprefix("file://")).is_dir() if is_local(uri) else storage.is_folder(uri)
        if not there:
            raise UserError(
                f"release {release!r} is unknown: there is no Census at {uri}. Correct the name, or CENSUS_TF_CENSUS."
            )
        return uri, storage

    def _storage(self, region: str) -> "Storage":
        from census_tf_dagster.io.s3 import S3Settings
        from census_tf_dagster.io.storage import Storage

        return Storage(S3Settings(region, self.s3_endpoint, self.s3_anonymous))


class StoreResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The store of a deployment: the place of plans and arrays.

    Attributes
    ----------
    location
        A folder or S3 prefix. It is created when it does not exist.
    s3_region, s3_endpoint
        How to reach S3. Credentials come from the environment or the role.
    cache
        Local folder for checkpoints that were fetched from S3.
    """

    location: str
    s3_region: str = ""
    s3_endpoint: str = ""
    cache: str = "~/.cache/census-tf-dagster"

    def uri(self) -> str:
        """Return the location of the store; a local one as an absolute path."""
        return normalise(self.location)

    def storage(self) -> "Storage":
        """Return read and write access to the store."""
        from census_tf_dagster.io.s3 import S3Settings
        from census_tf_dagster.io.storage import Storage

        return Storage(S3Settings(self.s3_region, self.s3_endpoint))

    def cache_folder(self) -> Path:
        """Return the local cache folder."""
        return Path(self.cache).expanduser()
