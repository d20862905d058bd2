"""Writes metadata for people, with titles, and reads it back by key."""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from census_tf_dagster.config.dagster_names import key_of, title_of


def titled(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return metadata with a title in place of each key."""
    return {title_of(key): value for key, value in metadata.items()}


def values_of(metadata: Mapping[str, dg.MetadataValue[Any]]) -> dict[str, Any]:
    """Return the values of metadata that was `titled`, by key."""
    return {key_of(title): value.value for title, value in metadata.items()}
