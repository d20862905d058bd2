"""Counts the tokens that a release still needs, and estimates their cost from measured rates.

The arithmetic of prices belongs in `config.cost`.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict

from census_tf_dagster.census.plan import Plan, to_compute
from census_tf_dagster.config.cost import Cost, Throughput, choose_rate, cost_of
from census_tf_dagster.errors import UserError
from census_tf_dagster.pipeline.context import StoredContext
from census_tf_dagster.store.array import EmbeddingsArray
from census_tf_dagster.store.committed import missing_megabatches
from census_tf_dagster.store.write_notes import read_notes


def tokens_left(context: StoredContext, plan: Plan) -> int:
    """Return the number of tokens in megabatches that are not committed. Reads only metadata."""
    batches = to_compute(plan.megabatches)
    if context.store.holds_files(context.folder.array):
        array = EmbeddingsArray.open(context.folder.array, context.store, context.identity)
        notes = read_notes(context.store, context.folder, plan, range(plan.totals.shards))
        batches = missing_megabatches(array, plan, batches, notes)
    return sum(batch.tokens for batch in batches)


def estimate(context: StoredContext, tokens: int, shards: Iterable[Throughput]) -> Cost:
    """Estimate time and cost of a number of tokens.

    Parameters
    ----------
    context
        The set, with its prices and its canary.
    tokens
        Number of tokens.
    shards
        Throughputs of the set's latest shards.
    """
    spending = context.settings.spending
    return cost_of(tokens, choose_rate(shards, read_canary(context), spending.gpu_type), spending)


def write_canary(context: StoredContext, throughput: Throughput) -> None:
    """Store the rate that a canary measured, for later plans of the set."""
    context.store.make_place(context.folder.store)
    context.store.write(context.folder.canary, json.dumps(asdict(throughput)).encode())


def read_canary(context: StoredContext) -> Throughput | None:
    """Return the rate that the set's last canary measured; None if there was no canary.

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
        raise UserError(
            f"{uri} is damaged ({error}). Expected the rate that a canary measured: run the canary of "
            f"{context.settings.name} again."
        ) from error
    return found
