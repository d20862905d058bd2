"""A set's assets, run in the process of the test."""

from typing import Any

import dagster as dg

from census_tf_dagster.definitions import build_definitions, load_sets
from census_tf_dagster.orchestration.partitions import RELEASES
from census_tf_dagster.orchestration.resources import CensusResource, StoreResource
from tests.support.project import RELEASE, Project


class Deployment:
    """A set's assets, run one partition at a time in this process."""

    def __init__(self, project: Project, instance: dg.DagsterInstance) -> None:
        self.instance = instance
        defs = build_definitions(
            load_sets(project.folder / "sets"),
            CensusResource(location=project.env["CENSUS_TF_CENSUS"]),
            StoreResource(location=project.env["CENSUS_TF_STORE"]),
        )
        self.job = defs.resolve_implicit_global_asset_job_def()
        instance.add_dynamic_partitions(str(RELEASES.name), [RELEASE])

    def run(self, asset: str, partition: str, config: dict[str, Any] | None = None) -> dg.ExecuteInProcessResult:
        return self.job.execute_in_process(
            partition_key=partition,
            asset_selection=[dg.AssetKey(["tiny", asset])],
            instance=self.instance,
            run_config={"ops": {f"tiny__{asset}": {"config": config}}} if config else None,
            raise_on_error=False,
        )

    def verified(self) -> bool:
        """The last evaluation of the check."""
        records = self.instance.event_log_storage.get_asset_check_execution_history(
            dg.AssetCheckKey(dg.AssetKey(["tiny", "embeddings_array"]), "verified"), limit=1
        )
        evaluation = records[0].evaluation
        assert evaluation is not None
        assert evaluation.partition == RELEASE
        return evaluation.passed
