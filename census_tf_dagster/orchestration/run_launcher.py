"""The run launcher for Kubernetes: Dagster's own, with two looks before a worker counts as lost."""

from typing import Any

import dagster as dg
from dagster._core.launcher import CheckRunHealthResult, WorkerStatus
from dagster_k8s import K8sRunLauncher


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
