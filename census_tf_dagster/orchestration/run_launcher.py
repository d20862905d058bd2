"""The run launcher for Kubernetes: Dagster's own, with two looks before a worker counts as lost.

Dagster's launcher never deletes the Job of a run that ended without its worker (Dagster issue 16535). This module only
finds and deletes Jobs; the sensor `lost_runs` decides which.
"""

from collections.abc import Mapping
from typing import Any

import dagster as dg
from dagster._core.launcher import CheckRunHealthResult, WorkerStatus
from dagster_k8s import K8sRunLauncher

REQUEST_SECONDS = 10.0
"""The longest wait for the cluster's API."""


class KubernetesRunLauncher(K8sRunLauncher):
    """Dagster's launcher of Kubernetes Jobs, which survives an error of the cluster's API.

    Configure it in `dagster.yaml` under ``run_launcher``, with the configuration of `K8sRunLauncher`.
    """

    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self._unseen: set[str] = set()

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Return whether the run's worker is there. It is unknown only when two looks in a row did not see it.

        Dagster's run monitoring fails a run as soon as its worker is unknown. After a single error of the API, such as
        a reset connection, another worker would do the same work at full price.
        """
        seen: CheckRunHealthResult = super().check_run_worker_health(run)
        if seen.status != WorkerStatus.UNKNOWN:
            self._unseen.discard(run.run_id)
        elif run.run_id not in self._unseen:
            self._unseen.add(run.run_id)
            return CheckRunHealthResult(WorkerStatus.RUNNING, f"not seen once: {seen.msg}")
        return seen

    def unfinished_jobs(self) -> Mapping[str, str]:
        """Return the id of the run of each Job that waits for a node or runs, by the Job's name."""
        listed = self._api_client.batch_api.list_namespaced_job(
            self.job_namespace, label_selector="dagster/run-id", _request_timeout=REQUEST_SECONDS
        )
        return {
            job.metadata.name: job.metadata.labels["dagster/run-id"]
            for job in listed.items
            if job.metadata.deletion_timestamp is None
            and not any(
                one.type in ("Complete", "Failed") and one.status == "True" for one in job.status.conditions or ()
            )
        }

    def delete_job(self, name: str) -> None:
        """Delete a Job and its pods. A pod that runs gets SIGTERM first.

        Raises
        ------
        Exception
            When the API does not answer, or refuses.
        """
        self._api_client.batch_api.delete_namespaced_job(
            name, self.job_namespace, propagation_policy="Background", _request_timeout=REQUEST_SECONDS
        )
