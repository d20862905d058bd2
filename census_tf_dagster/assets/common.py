"""What the assets share: keys, and opening the job of a partition."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import dagster as dg

from census_tf_dagster.errors import UserError
from census_tf_dagster.resources import CensusResource, StoreResource
from census_tf_dagster.settings import SetSettings

if TYPE_CHECKING:
    from census_tf_dagster.steps.job import Job


def asset_key(settings: SetSettings, name: str) -> dg.AssetKey:
    """Return the key of one of a set's assets: set/name."""
    return dg.AssetKey([settings.name, name])


NO_RETRY_TAG = "dagster/retry_on_asset_or_op_failure"
"""Dagster's own. ``false`` on a run: its retries are for workers that are lost, not for what an asset raises."""


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
def partition_job(
    settings: SetSettings,
    release: str,
    census: CensusResource,
    store: StoreResource,
    *,
    require_device: bool = False,
) -> Iterator["Job"]:
    """Open the job of a partition; what a user can mend fails the run at once, without retries."""
    try:
        if require_device and settings.device == "cuda":
            from census_tf_dagster.inference.devices import require_gpu

            require_gpu(settings.name, release)
        with release_job(settings, release, census, store) as job:
            yield job
    except UserError as error:
        raise final_failure(str(error)) from error


def final_failure(description: str, metadata: Mapping[str, Any] | None = None) -> dg.Failure:
    """Make the failure of something that no retry mends, and tell Dagster not to retry the run on another node."""
    context = dg.OpExecutionContext.get()
    context.instance.add_run_tags(context.run_id, {NO_RETRY_TAG: "false"})
    return dg.Failure(description, metadata=metadata, allow_retries=False)
