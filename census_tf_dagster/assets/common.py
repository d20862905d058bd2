"""What the three assets share: keys, and opening the job of a partition."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import dagster as dg

from census_tf_dagster.errors import UserError
from census_tf_dagster.resources import CensusResource, StoreResource
from census_tf_dagster.settings import SetSettings

if TYPE_CHECKING:
    from census_tf_dagster.steps.job import Job


def asset_key(settings: SetSettings, name: str) -> dg.AssetKey:
    """Return the key of one of a set's assets: set/name."""
    return dg.AssetKey([settings.name, name])


@contextmanager
def release_job(settings: SetSettings, release: str, census: CensusResource, store: StoreResource) -> Iterator["Job"]:
    """Open the job of a set and release, wherever the resources say."""
    from census_tf_dagster.steps.job import open_job

    with open_job(
        settings,
        release=release,
        census_uri=census.uri(release),
        census=census.storage(),
        store_uri=store.uri(),
        store=store.storage(),
        cache=store.cache_folder(),
    ) as job:
        yield job


@contextmanager
def partition_job(settings: SetSettings, release: str, census: CensusResource, store: StoreResource) -> Iterator["Job"]:
    """Open the job of a partition; what a user can mend fails the run at once, without retries."""
    try:
        with release_job(settings, release, census, store) as job:
            yield job
    except UserError as error:
        raise dg.Failure(description=str(error), allow_retries=False) from error
