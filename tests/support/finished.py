"""Finished arrays with values of a test's choice instead of a model's."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import tiledbsoma

from census_tf_dagster.census.plan import read_plan
from census_tf_dagster.pipeline.finish_array import finish_array
from census_tf_dagster.pipeline.plan_release import make_plan
from census_tf_dagster.store.array import EmbeddingsArray
from census_tf_dagster.store.verification import verify_shard
from tests.support.project import RELEASE, Project

Values = Callable[[np.ndarray, np.ndarray], np.ndarray]


def obs_of(project: Project, release: str = RELEASE) -> pd.DataFrame:
    """Obs, as tiledbsoma alone reads it."""
    uri = str(project.folder / "census" / release / "census_data" / "homo_sapiens" / "obs")
    with tiledbsoma.open(uri) as obs:
        return obs.read().concat().to_pandas().set_index("soma_joinid")


def by_type(joinids: np.ndarray, types: np.ndarray, seed: int = 0) -> np.ndarray:
    """Values around a centre of each cell's type; equal arguments, equal values."""
    names = np.unique(types)
    centres = 3 + np.random.default_rng(5).normal(size=(len(names), 16))
    noise = np.random.default_rng([seed, len(joinids)]).normal(size=(len(joinids), 16))
    return (centres[np.searchsorted(names, types)] + 0.4 * noise).astype(np.float32)


def finish(project: Project, values: Values, release: str = RELEASE) -> None:
    """Plan, write values instead of a model's, and finish."""
    obs = obs_of(project, release)
    with project.context("tiny", release) as context:
        make_plan(context)
        plan = read_plan(context.store, context.folder.plan)
        array = EmbeddingsArray.open(context.folder.array, context.store, context.identity)
        ids = np.concatenate(plan.read_ids(context.store, plan.megabatches))
        all_values = values(ids, obs.cell_type.astype(str).to_numpy()[ids])
        start = 0
        for batch in plan.megabatches:
            array.write(ids[start : start + batch.cells], all_values[start : start + batch.cells])
            start += batch.cells
        for shard in range(plan.totals.shards):
            assert not verify_shard(array, plan, context.folder, shard)
        finish_array(context)
