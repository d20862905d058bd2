"""What is left to compute of a release, and what the set's canary says of its speed."""

import json
from collections.abc import Iterable
from dataclasses import asdict

from census_tf_dagster.census.plan import Plan, to_compute
from census_tf_dagster.config.cost import Cost, Throughput, choose_rate, cost_of
from census_tf_dagster.errors import UserError
from census_tf_dagster.pipeline.context import ReleaseContext
from census_tf_dagster.store.array import EmbeddingsArray
from census_tf_dagster.store.committed import missing_megabatches
from census_tf_dagster.store.write_notes import read_notes


def tokens_left(context: ReleaseContext, plan: Plan) -> int:
    """Return the tokens that a release still needs: those of megabatches that are not committed. Reads metadata."""
    batches = to_compute(plan.megabatches)
    if context.store.holds_files(context.folder.array):
        array = EmbeddingsArray.open(context.folder.array, context.store, context.identity)
        notes = read_notes(context.store, context.folder, plan, range(plan.totals.shards))
        batches = missing_megabatches(array, plan, batches, notes)
    return sum(batch.tokens for batch in batches)


def estimate(context: ReleaseContext, tokens: int, shards: Iterable[Throughput]) -> Cost:
    """Work out what some tokens take.

    Parameters
    ----------
    context
        The set, with its prices and its canary.
    tokens
        How many.
    shards
        What the last shards of this set have done.
    """
    spending = context.settings.spending
    return cost_of(tokens, choose_rate(shards, read_canary(context), spending.gpu_type), spending)


def write_canary(context: ReleaseContext, throughput: Throughput) -> None:
    """Keep what a canary found of the set's speed, for the plans that come."""
    context.store.make_place(context.folder.store)
    context.store.write(context.folder.canary, json.dumps(asdict(throughput)).encode())


def read_canary(context: ReleaseContext) -> Throughput | None:
    """Return what the set's last canary found; None when there was none.

    Raises
    ------
    UserError
        When the file is damaged.
    """
    uri = context.folder.canary
    if not context.store.exists(uri):
        return None
    try:
        found = Throughput(**json.loads(context.store.read(uri)))
        if not (found.tokens > 0 and found.seconds > 0 and found.devices > 0):
            raise ValueError(f"expected numbers above 0, found {found}")
    except (ValueError, TypeError) as error:
        raise UserError(f"{uri} is damaged ({error}): run the canary of {context.settings.name} again.") from error
    return found
