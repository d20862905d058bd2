"""What the assets share: keys, and opening the context of a release."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypedDict
from urllib.parse import quote

import dagster as dg

from census_tf_dagster.config.dagster_names import NO_RETRY_TAG
from census_tf_dagster.config.settings import SetSettings
from census_tf_dagster.errors import UserError
from census_tf_dagster.identity import NUMERIC_VERSION
from census_tf_dagster.orchestration.resources import CensusResource, StoreResource

if TYPE_CHECKING:
    from census_tf_dagster.pipeline.context import ReleaseContext

MODEL_PAGE = "https://github.com/czi-ai/transcriptformer"


def asset_key(settings: SetSettings, name: str) -> dg.AssetKey:
    """Return the key of one of a set's assets: set/name."""
    return dg.AssetKey([settings.name, name])


CODE_VERSION = str(NUMERIC_VERSION)
"""Of all assets: raised when values may change, so the interface shows which partitions an older one made."""


class AssetArguments(TypedDict):
    """Arguments of `dg.asset`."""

    key: dg.AssetKey
    group_name: str
    owners: list[str]
    code_version: str
    tags: dict[str, str]
    metadata: dict[str, Any]


def asset_of(settings: SetSettings, name: str) -> AssetArguments:
    """Return what all assets of a set have in common."""
    return {
        "key": asset_key(settings, name),
        "group_name": settings.name,
        "owners": list(settings.owners),
        "code_version": CODE_VERSION,
        "tags": _asset_tags(settings),
        "metadata": _asset_metadata(settings),
    }


def _asset_tags(settings: SetSettings) -> dict[str, str]:
    """Return what assets are found by in the interface."""
    return {"census_tf/organism": settings.organism, "census_tf/compute_precision": settings.compute_precision}


def _asset_metadata(settings: SetSettings) -> dict[str, Any]:
    """Return what the page of an asset says of its set, for a person."""
    facts: dict[str, Any] = {
        "checkpoint": settings.checkpoint,
        "cells": settings.value_filter or "all of the organism",
        "precision": f"computed in {settings.compute_precision}, stored as {settings.storage_precision}",
        "census": dg.MetadataValue.url("https://chanzuckerberg.github.io/cellxgene-census/"),
        "model": dg.MetadataValue.url(MODEL_PAGE),
    }
    if settings.mod > 1:
        facts["trial"] = f"only 1 joinid in {settings.mod}"
    if settings.publication is not None and settings.publication.model_link:
        facts["model"] = dg.MetadataValue.url(settings.publication.model_link)
    return facts


def console_link(uri: str, store: StoreResource) -> dict[str, Any]:
    """Return a link to AWS's console for what is there."""
    if not uri.startswith("s3://") or store.s3_endpoint:
        return {}
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    page = f"https://s3.console.aws.amazon.com/s3/buckets/{bucket}?prefix={quote(prefix)}/"
    return {"console": dg.MetadataValue.url(page)}


@contextmanager
def release_context(
    settings: SetSettings, release: str, census: CensusResource, store: StoreResource
) -> Iterator["ReleaseContext"]:
    """Open the context of a set and release, wherever the resources say."""
    from census_tf_dagster.pipeline.context import open_context

    census_uri, storage = census.place(release)
    with open_context(
        settings,
        release=release,
        census_uri=census_uri,
        census=storage,
        store_uri=store.uri(),
        store=store.storage(),
        cache=store.cache_folder(),
    ) as opened:
        yield opened


@contextmanager
def partition_context(
    settings: SetSettings,
    release: str,
    census: CensusResource,
    store: StoreResource,
    *,
    require_device: bool = False,
) -> Iterator["ReleaseContext"]:
    """Open the context of a partition; what a user can mend fails the run at once, without retries."""
    from census_tf_dagster.store.removal import noticing_removal

    try:
        if require_device and settings.device == "cuda":
            from census_tf_dagster.inference.devices import require_gpu

            require_gpu(settings.name, release)
        with release_context(settings, release, census, store) as opened, noticing_removal(opened.store, opened.folder):
            yield opened
    except UserError as error:
        raise final_failure(str(error)) from error


def final_failure(description: str, metadata: Mapping[str, Any] | None = None) -> dg.Failure:
    """Make the failure of something that no retry mends, and tell Dagster not to retry the run on another node."""
    context = dg.OpExecutionContext.get()
    context.instance.add_run_tags(context.run_id, {NO_RETRY_TAG: "false"})
    return dg.Failure(description, metadata=metadata, allow_retries=False)


def shard_of(context: dg.AssetExecutionContext, dimension: str) -> tuple[str, str, int]:
    """Return the key of a shard's partition, its release, and its number in a dimension."""
    keys = context.partition_key
    if not isinstance(keys, dg.MultiPartitionKey):
        raise TypeError(f"partition key {keys!r} has no release and shard")
    return str(keys), keys.keys_by_dimension["release"], int(keys.keys_by_dimension[dimension])
