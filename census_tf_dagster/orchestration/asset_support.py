"""What all assets share: keys, common arguments, the context of a release, and final failures."""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, TypedDict
from urllib.parse import quote

import dagster as dg

from census_tf_dagster.config.dagster_names import NO_RETRY_TAG
from census_tf_dagster.config.settings import CommonSettings, FileSetSettings, SetSettings
from census_tf_dagster.errors import UserError
from census_tf_dagster.identity import NUMERIC_VERSION
from census_tf_dagster.orchestration.metadata import titled
from census_tf_dagster.orchestration.resources import CensusResource, StoreResource

if TYPE_CHECKING:
    from census_tf_dagster.own_cells.file_context import FileContext
    from census_tf_dagster.pipeline.context import (
        EmbeddingContext,
        Places,
        PlannedContext,
        ReleaseContext,
        StoredContext,
    )

RUN_IS_OVER = 3
"""Exit status of a worker whose run has ended without it."""

MODEL_PAGE = "https://github.com/czi-ai/transcriptformer"


def asset_key(settings: CommonSettings, name: str) -> dg.AssetKey:
    """Return the key of an asset of a set: set/name."""
    return dg.AssetKey([settings.name, name])


CODE_VERSION = str(NUMERIC_VERSION)
"""The code version of all assets. It changes when values may change, so that the web interface marks partitions that
older code made."""


class AssetArguments(TypedDict):
    """The arguments of `dg.asset` that all assets of a set share."""

    key: dg.AssetKey
    group_name: str
    owners: list[str]
    code_version: str
    tags: dict[str, str]
    metadata: dict[str, Any]


def asset_of(settings: CommonSettings, name: str) -> AssetArguments:
    """Return the arguments that all assets of a set share."""
    return {
        "key": asset_key(settings, name),
        "group_name": settings.name,
        "owners": list(settings.owners),
        "code_version": CODE_VERSION,
        "tags": _asset_tags(settings),
        "metadata": titled(_asset_metadata(settings)),
    }


def _asset_tags(settings: CommonSettings) -> dict[str, str]:
    """Return the tags by which people find assets in the web interface."""
    organism = {"census_tf/organism": settings.organism} if isinstance(settings, SetSettings) else {}
    return {**organism, "census_tf/compute_precision": settings.compute_precision}


def _asset_metadata(settings: CommonSettings) -> dict[str, Any]:
    """Return the facts about the set that the page of an asset shows to a person."""
    facts: dict[str, Any] = {
        "checkpoint": settings.checkpoint,
        "precision": f"computed in {settings.compute_precision}, stored as {settings.storage_precision}",
        "model": dg.MetadataValue.url(MODEL_PAGE),
    }
    if isinstance(settings, FileSetSettings):
        facts["files"] = settings.files
    if isinstance(settings, SetSettings):
        facts["cells"] = settings.value_filter or "all of the organism"
        facts["census"] = dg.MetadataValue.url("https://chanzuckerberg.github.io/cellxgene-census/")
        if settings.mod > 1:
            facts["trial"] = f"only 1 joinid in {settings.mod}"
        if settings.publication is not None and settings.publication.model_link:
            facts["model"] = dg.MetadataValue.url(settings.publication.model_link)
    return facts


def console_link(uri: str, store: StoreResource) -> dict[str, Any]:
    """Return a link to this location in AWS's console, as metadata; empty when AWS does not hold it."""
    if not uri.startswith("s3://") or store.s3_endpoint:
        return {}
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    page = f"https://s3.console.aws.amazon.com/s3/buckets/{bucket}?prefix={quote(prefix)}/"
    return {"console": dg.MetadataValue.url(page)}


@contextmanager
def release_context(
    settings: SetSettings, release: str, census: CensusResource, store: StoreResource
) -> Iterator["ReleaseContext"]:
    """Open the context of a release of a set, at the locations of the resources."""
    from census_tf_dagster.pipeline.context import open_context

    with open_context(settings, _places(release, census, store)) as opened:
        yield opened


@contextmanager
def file_context(
    settings: FileSetSettings, name: str, store: StoreResource, *, to_embed: bool = False
) -> Iterator["FileContext"]:
    """Open the context of a file of a set of files, to embed it or only to look at it."""
    from census_tf_dagster.own_cells.file_context import open_file

    with open_file(settings, name, store.uri(), store.storage(), store.cache_folder(), whole=to_embed) as opened:
        yield opened


@contextmanager
def planned_context(
    settings: SetSettings, release: str, census: CensusResource, store: StoreResource
) -> Iterator["PlannedContext"]:
    """Open what a run needs of a release of a set that copies cells: no checkpoint."""
    from census_tf_dagster.pipeline.context import open_planned

    with open_planned(settings, _places(release, census, store)) as opened:
        yield opened


def _places(release: str, census: CensusResource, store: StoreResource) -> "Places":
    from census_tf_dagster.pipeline.context import Places

    census_uri, storage = census.place(release)
    return Places(release, census_uri, storage, store.uri(), store.storage(), store.cache_folder())


@contextmanager
def partition_context(
    settings: SetSettings,
    release: str,
    census: CensusResource,
    store: StoreResource,
    *,
    require_device: bool = False,
) -> Iterator["ReleaseContext"]:
    """Open the context of a partition. A `UserError` fails the run at once, without retries."""
    with _failing_at_once():
        if require_device:
            _require_device(settings, release)
        with release_context(settings, release, census, store) as opened, _noticing_removal(opened):
            yield opened


@contextmanager
def file_partition_context(
    settings: FileSetSettings, name: str, store: StoreResource, *, to_embed: bool = False
) -> Iterator["FileContext"]:
    """Open the context of the partition of a file. A `UserError` fails the run at once, without retries."""
    with _failing_at_once():
        if to_embed:
            _require_device(settings, name)
        with file_context(settings, name, store, to_embed=to_embed) as opened, _noticing_removal(opened):
            yield opened


@contextmanager
def whole_context(
    settings: CommonSettings, partition: str, census: CensusResource, store: StoreResource
) -> Iterator["EmbeddingContext"]:
    """Open the context of a release or file, as `partition_context` or `file_partition_context` does."""
    if isinstance(settings, FileSetSettings):
        with file_partition_context(settings, partition, store) as file:
            yield file
    elif isinstance(settings, SetSettings):
        with partition_context(settings, partition, census, store) as release:
            yield release


def _require_device(settings: CommonSettings, partition: str) -> None:
    if settings.device == "cuda":
        from census_tf_dagster.inference.devices import require_gpu

        require_gpu(settings.name, partition)


@contextmanager
def planned_partition_context(
    settings: SetSettings, release: str, census: CensusResource, store: StoreResource
) -> Iterator["PlannedContext"]:
    """Open what a run that copies cells needs of a partition. A `UserError` fails the run at once, without retries."""
    with (
        _failing_at_once(),
        planned_context(settings, release, census, store) as opened,
        _noticing_removal(opened),
    ):
        yield opened


@contextmanager
def _failing_at_once() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise final_failure(str(error)) from error


def _noticing_removal(opened: "StoredContext") -> AbstractContextManager[None]:
    from census_tf_dagster.store.removal import noticing_removal

    return noticing_removal(opened.store, opened.folder)


def final_failure(description: str, metadata: Mapping[str, Any] | None = None) -> dg.Failure:
    """Return a failure that no retry can correct, and tell Dagster not to retry the run on another node."""
    context = dg.OpExecutionContext.get()
    context.instance.add_run_tags(context.run_id, {NO_RETRY_TAG: "false"})
    return dg.Failure(description, metadata=metadata, allow_retries=False)


def stop_if_run_is_over(context: dg.AssetExecutionContext) -> None:
    """End this process at once if its run has ended without it.

    Dagster may declare a worker lost that is not, after an error of the cluster's API or a frozen node, and start
    another one. An exception would report a second end of the run: a canceled run would count as failed, and Dagster
    might retry it. What is committed stays, as after a kill.
    """
    try:
        run = context.instance.get_run_by_id(context.run.run_id)
    except Exception as error:
        context.log.warning(f"Dagster's records cannot be read, so the worker goes on: {type(error).__name__}: {error}")
        return
    if run is not None and run.is_finished:
        said = f"Run {run.run_id} has ended ({run.status.value}) without this worker, so the worker stops."
        print(said, file=sys.stderr, flush=True)
        os._exit(RUN_IS_OVER)


def shard_of(context: dg.AssetExecutionContext, dimension: str) -> tuple[str, str, int]:
    """Return the partition key of a shard, its release, and its number in a dimension."""
    keys = context.partition_key
    if not isinstance(keys, dg.MultiPartitionKey):
        raise TypeError(f"partition key {keys!r} has no release and shard")
    return str(keys), keys.keys_by_dimension["release"], int(keys.keys_by_dimension[dimension])
