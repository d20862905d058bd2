"""One worker of a shard without a model: ``python -m tests.support.s3_driver FOLDER SET SHARD [all]``.

Where Census and store are, the environment says. Commits what `tests.support.builders.value_of` says of each
cell, megabatch by megabatch, as a shard does; then reads back.
"""

import os
import sys
from pathlib import Path

from census_tf_dagster.census.plan import read_plan
from census_tf_dagster.store.array import EmbeddingsArray
from census_tf_dagster.store.committed import missing_megabatches
from census_tf_dagster.store.verification import verify_shard
from tests.support.builders import value_of
from tests.support.project import Project


def main() -> None:
    folder, name, shard, *everything = sys.argv[1:]
    places = {key: value for key, value in os.environ.items() if key.startswith("CENSUS_TF_")}
    with Project(Path(folder), places).context(name) as context:
        plan = read_plan(context.store, context.folder.plan)
        array = EmbeddingsArray.open(context.folder.array, context.store, context.identity)
        batches = plan.shard(int(shard))
        todo = batches if everything else missing_megabatches(array, plan, batches, {})
        with array.writing() as write:
            for ids in plan.read_ids(context.store, todo):
                write(ids, value_of(ids, array.n_features))
                print("committed", ids[0], flush=True)
        problems = verify_shard(array, plan, context.folder, int(shard))
        assert not problems, problems
    print("done", flush=True)


if __name__ == "__main__":
    main()
