"""The names of our assets, checks, sensors, tags and metadata in Dagster. Each name is written once, here.

This module imports nothing, so that the commands for a running deployment can use the names without Dagster.
"""

PLAN = "obs_id_plan"
APPROVAL = "approval"
SHARDS = "shard_embeddings"
REUSED = "reused_embeddings"
ARRAY = "embeddings_array"
INDEX = "embeddings_index"

VERIFIED_CHECK = "verified"
"""Check of the array: it agrees with the plan, and nothing was committed since its verification."""
UPSTREAM_CHECK = "same_as_upstream"
"""Check of a shard and of the array: upstream's own code computes the same values for a few cells."""

LOST_RUNS = "lost_runs"
"""The sensor that ends runs whose worker is gone, and requests retries that Dagster lost."""
ALERTS = "alerts"
"""The sensor that sends messages to people."""
ALERTED_TAG = "census_tf/alerted"
"""On a failed run: the sensor `alerts` has told it."""
ASKED_AGAIN = "The retry of this run was lost"
"""The first words of the event with which that sensor requests a retry."""
LOOK_BACK_DAYS = 14
"""The sensor ignores retries that were lost longer ago."""

LAUNCH_TAG = "census_tf/launch"
"""On a backfill: the set and release that `launch` started it for."""
RECOMPUTE_TAG = "census_tf/recompute"
"""On a backfill and its runs: ``true`` when all cells are computed again."""
WILL_RETRY_TAG, RETRIED_BY_TAG = "dagster/will_retry", "dagster/auto_retry_run_id"
"""Dagster's own tags: a failed run will be retried, and the id of the retry."""
NO_RETRY_TAG = "dagster/retry_on_asset_or_op_failure"
"""Dagster's own tag. ``false`` on a run: Dagster retries it when its worker is lost, not when an asset raises."""

_SPELLINGS = {
    "usd": "USD",
    "gpu": "GPU",
    "gpus": "GPUs",
    "gib": "GiB",
    "ids": "IDs",
    "umap": "UMAP",
    "census": "Census",
}


def title_of(key: str) -> str:
    """Return the title under which people see a key of metadata: ``GPU hours`` for ``gpu_hours``."""
    words = key.split("_")
    first = words[0] if words[0] in _SPELLINGS else words[0].capitalize()
    return " ".join(_SPELLINGS.get(word, word) for word in (first, *words[1:]))


def key_of(title: str) -> str:
    """Return the key of a title. This undoes `title_of`."""
    return title.lower().replace(" ", "_")
