"""The inputs and outputs of Dagster's Helm chart, as far as deploy/k8s/values.yaml uses it.

Neither the chart nor its published schema can be fetched where these tests run. This was written after reading them in
dagster's repository (helm/dagster: schema/, templates/configmap-instance.yaml and templates/helpers/instance/), and
says the same in fewer words: names that the chart does not know are refused, and the instance is put together as its
template does. In November 2026 Helm 4.2 rendered the text of those templates to the same instance, but for threads of
sensors and schedules, which the chart sets by itself. That was before the launcher was one of ours; since then the
template has been read only: `dagsterYaml.runLauncher.custom` copies module, class and config. Whoever has the chart
asks it: deploy/k8s/README.md, step 8.
"""

from typing import Any

import jsonschema

Values = dict[str, Any]


def _object(required: str = "", **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


ANY: dict[str, Any] = {"type": "object"}
TEXT, NUMBER, YES_NO = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
SOURCE = {"anyOf": [TEXT, _object("env", env=TEXT)]}
NAMED = {"type": "array", "items": _object("name", name=TEXT)}
IMAGE = _object(
    "repository tag pullPolicy",
    repository=TEXT,
    tag=TEXT,
    pullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
)
CLASS = _object("module class config", module=TEXT, config=ANY, **{"class": TEXT})
POD = {"podSecurityContext": ANY, "resources": ANY, "envConfigMaps": NAMED, "image": IMAGE}
# The chart's schema wants all four.
TICKS = _object(
    "purgeAfterDays",
    purgeAfterDays=_object(
        "skipped started success failure", skipped=NUMBER, started=NUMBER, success=NUMBER, failure=NUMBER
    ),
)
SCHEMA = _object(
    **{
        "global": _object(dagsterHome=TEXT, serviceAccountName=TEXT, postgresqlSecretName=TEXT),
        "rbacEnabled": YES_NO,
        "serviceAccount": _object(create=YES_NO),
        "generatePostgresqlPasswordSecret": YES_NO,
        "postgresql": _object(
            enabled=YES_NO,
            postgresqlHost=TEXT,
            postgresqlUsername=TEXT,
            postgresqlDatabase=TEXT,
            postgresqlScheme=TEXT,
            service=_object(port=NUMBER),
        ),
        "telemetry": _object(enabled=YES_NO),
        "dagsterWebserver": _object(service=_object("type port", type=TEXT, port=NUMBER), readinessProbe=ANY, **POD),
        "dagster-user-deployments": _object(
            enabled=YES_NO,
            enableSubchart=YES_NO,
            deployments={
                "type": "array",
                "items": _object(
                    "name image port",
                    name=TEXT,
                    codeServerArgs={"type": "array", "items": TEXT},
                    port=NUMBER,
                    envSecrets=NAMED,
                    includeConfigInLaunchedRuns=_object("enabled", enabled=YES_NO),
                    **POD,
                ),
            },
        ),
        "computeLogManager": _object(
            type={"const": "S3ComputeLogManager"},
            config=_object(
                "s3ComputeLogManager",
                s3ComputeLogManager=_object("bucket", bucket=SOURCE, prefix=SOURCE, uploadInterval=NUMBER),
            ),
        ),
        "runLauncher": _object(
            type={"const": "CustomRunLauncher"},
            config=_object("customRunLauncher", customRunLauncher=CLASS),
        ),
        "dagsterDaemon": _object(
            runCoordinator=_object(
                "enabled type config",
                enabled=YES_NO,
                type={"const": "CustomRunCoordinator"},
                config=_object("customRunCoordinator", customRunCoordinator=CLASS),
            ),
            runMonitoring=_object(
                enabled=YES_NO,
                startTimeoutSeconds=NUMBER,
                cancelTimeoutSeconds=NUMBER,
                pollIntervalSeconds=NUMBER,
                maxResumeRunAttempts=NUMBER,
            ),
            runRetries=_object(enabled=YES_NO, maxRetries=NUMBER, retryOnAssetOrOpFailure=YES_NO),
            **POD,
        ),
        "retention": _object(enabled=YES_NO, schedule=TICKS, sensor=TICKS, autoMaterialize=TICKS),
        # Goes into dagster.yaml as it stands.
        "additionalInstanceConfig": ANY,
    }
)


def check(values: Values) -> None:
    """Raise if the chart would refuse the values, or does not know a name."""
    jsonschema.validate(values, SCHEMA)


def instance_of(values: Values) -> dict[str, Any]:
    """Return the dagster.yaml in the chart's ConfigMap."""
    database, daemon = values["postgresql"], values["dagsterDaemon"]
    storage = {
        "postgres_db": {
            "username": database["postgresqlUsername"],
            "password": {"env": "DAGSTER_PG_PASSWORD"},
            "hostname": database["postgresqlHost"],
            "db_name": database["postgresqlDatabase"],
            "port": database["service"]["port"],
            "params": {},
            "scheme": database["postgresqlScheme"],
        }
    }
    logs = values["computeLogManager"]["config"]["s3ComputeLogManager"]
    monitoring, retries = daemon["runMonitoring"], daemon["runRetries"]
    return {
        "scheduler": {"module": "dagster.core.scheduler", "class": "DagsterDaemonScheduler"},
        "schedule_storage": _class("dagster_postgres.schedule_storage", "PostgresScheduleStorage", storage),
        "run_storage": _class("dagster_postgres.run_storage", "PostgresRunStorage", storage),
        "event_log_storage": _class("dagster_postgres.event_log", "PostgresEventLogStorage", storage),
        "run_launcher": values["runLauncher"]["config"]["customRunLauncher"],
        "run_coordinator": daemon["runCoordinator"]["config"]["customRunCoordinator"],
        "compute_logs": _class(
            "dagster_aws.s3.compute_log_manager",
            "S3ComputeLogManager",
            {
                "bucket": logs["bucket"],
                "prefix": logs["prefix"],
                "verify": True,
                "upload_interval": logs["uploadInterval"],
            },
        ),
        "run_monitoring": {
            "enabled": monitoring["enabled"],
            "start_timeout_seconds": monitoring["startTimeoutSeconds"],
            "cancel_timeout_seconds": monitoring["cancelTimeoutSeconds"],
            "max_resume_run_attempts": monitoring["maxResumeRunAttempts"],
            "poll_interval_seconds": monitoring["pollIntervalSeconds"],
            "free_slots_after_run_end_seconds": 0,
        },
        "run_retries": {
            "enabled": retries["enabled"],
            "max_retries": retries["maxRetries"],
            "retry_on_asset_or_op_failure": retries["retryOnAssetOrOpFailure"],
        },
        "telemetry": values["telemetry"],
        "retention": {
            ours: {"purge_after_days": values["retention"][theirs]["purgeAfterDays"]}
            for ours, theirs in (
                ("sensor", "sensor"),
                ("schedule", "schedule"),
                ("auto_materialize", "autoMaterialize"),
            )
        },
        **values["additionalInstanceConfig"],
    }


def _class(module: str, name: str, config: Any) -> dict[str, Any]:
    return {"module": module, "class": name, "config": config}
