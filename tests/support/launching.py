"""Launching a run as webserver and daemon do."""

import os
import sys

import dagster as dg
from dagster._core.code_pointer import ModuleCodePointer
from dagster._core.launcher import LaunchRunContext
from dagster._core.origin import JobPythonOrigin, RepositoryPythonOrigin
from dagster._core.remote_origin import (
    ManagedGrpcPythonEnvCodeLocationOrigin,
    RemoteJobOrigin,
    RemoteRepositoryOrigin,
)
from dagster._core.run_coordinator import SubmitRunContext
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin

from census_tf_dagster.definitions import load_sets
from census_tf_dagster.orchestration.partitions import RELEASES
from tests.support.project import RELEASE, Project

ASSETS = {"shard_embeddings": f"{RELEASE}|0", "obs_id_plan": RELEASE, "embeddings_array": RELEASE}
RESOURCES = {name: dg.ResourceDefinition.none_resource() for name in ("census", "store")}


@dg.op
def nothing() -> None:
    pass


@dg.job
def job() -> None:
    """A job whose runs only look at launchers and monitoring."""
    nothing()


def launch(project: Project, asset: str, own_tags: dict[str, str] | None = None) -> None:
    """Submit and launch a run of one asset of the set `tiny`, as webserver and daemon do, from an instance's home."""
    definitions = load_sets(project.folder / "sets")
    with dg.DagsterInstance.from_config(project.env["DAGSTER_HOME"]) as instance:
        instance.add_dynamic_partitions(str(RELEASES.name), [RELEASE])
        key = dg.AssetKey(["tiny", asset])
        whole = dg.Definitions.merge(definitions, dg.Definitions(resources=RESOURCES))
        job = whole.resolve_implicit_global_asset_job_def().get_subset(asset_selection={key})
        target = LoadableTargetOrigin(executable_path=sys.executable, module_name="census_tf_dagster.definitions")
        location = ManagedGrpcPythonEnvCodeLocationOrigin(target, "census_tf_dagster.definitions")
        pointer = ModuleCodePointer("census_tf_dagster.definitions", "defs")
        run = instance.create_run_for_job(
            job,
            asset_selection={key},
            tags={"dagster/partition": ASSETS[asset], **(own_tags or {})},
            remote_job_origin=RemoteJobOrigin(RemoteRepositoryOrigin(location, "__repository__"), job.name),
            # As a code server says it on Kubernetes.
            job_code_origin=JobPythonOrigin(
                job.name, RepositoryPythonOrigin(sys.executable, pointer, os.environ.get("DAGSTER_CURRENT_IMAGE"))
            ),
        )
        instance.run_coordinator.submit_run(SubmitRunContext(run, workspace=None))  # type: ignore[arg-type]
        queued = instance.get_run_by_id(run.run_id)
        assert queued is not None
        assert queued.status == dg.DagsterRunStatus.QUEUED
        instance.run_launcher.launch_run(LaunchRunContext(queued, workspace=None))
