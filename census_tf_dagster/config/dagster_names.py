"""Names under which Dagster knows our assets, checks, sensors and tags: written once, for all who name them.

Imports nothing, so that commands on a running deployment can use them without Dagster.
"""

PLAN = "obs_id_plan"
APPROVAL = "approval"
SHARDS = "shard_embeddings"
REUSED = "reused_embeddings"
ARRAY = "embeddings_array"

VERIFIED_CHECK = "verified"
"""Check of the array: it is exactly the plan, and nothing was committed since that was verified."""
UPSTREAM_CHECK = "same_as_upstream"
"""Check of a shard and of the array: cells embedded again by upstream's own code have the same values."""

LOST_RUNS = "lost_runs"
"""The sensor that ends runs whose worker is gone, and retries runs whose retry was lost."""
ASKED_AGAIN = "The retry of this run was lost"
"""How the event begins with which that sensor retries a run."""
LOOK_BACK_DAYS = 14
"""A retry that was lost longer ago is not looked for."""

LAUNCH_TAG = "census_tf/launch"
"""On a backfill: the set and release that `launch` started it for."""
RECOMPUTE_TAG = "census_tf/recompute"
"""On a backfill and its runs: ``true`` when all cells are computed again."""
WILL_RETRY_TAG, RETRIED_BY_TAG = "dagster/will_retry", "dagster/auto_retry_run_id"
"""Dagster's own: a failed run will be retried, and which run does so."""
NO_RETRY_TAG = "dagster/retry_on_asset_or_op_failure"
"""Dagster's own. ``false`` on a run: its retries are for workers that are lost, not for what an asset raises."""
