"""deploy/k8s as its README applies it: the objects, the chart's values, and the resulting instance."""

from typing import Any

import yaml

from tests.support.helm_chart import instance_of
from tests.support.project import REPOSITORY

FOLDER = REPOSITORY / "deploy" / "k8s"
NAMESPACE = "census-tf"
CONTROL_IMAGE = "registry.example/census-tf-control:0.1.0"
PLACES = {"MY_DATA_BUCKET": "bucket", "MY_LOG_BUCKET": "dagster-logs", "MY_REGION": "us-west-2"}


def read_values(host: str = "postgres.example", port: int = 5432) -> dict[str, Any]:
    """values.yaml with the values that the README sets on the command line."""
    values: dict[str, Any] = yaml.safe_load((FOLDER / "values.yaml").read_text())
    values["postgresql"] |= {"postgresqlHost": host, "service": {"port": port}}
    return values


def read_objects() -> list[dict[str, Any]]:
    """objects.yaml with the names of a deployment."""
    text = (FOLDER / "objects.yaml").read_text()
    for place, name in PLACES.items():
        text = text.replace(place, name)
    return list(yaml.safe_load_all(text))


def environment() -> dict[str, str]:
    """The environment of every server and run."""
    (found,) = [one["data"] for one in read_objects() if one["metadata"]["name"] == "census-tf-env"]
    return dict(found)


def write_dagster_yaml(home: Any, database: dict[str, str], **launcher: Any) -> None:
    """Write the chart's dagster.yaml, with the changes that only a test needs."""
    values = read_values(database["DAGSTER_PG_HOST"], int(database["DAGSTER_PG_PORT"]))
    # The test's database has another name than a deployment's.
    values["postgresql"]["postgresqlDatabase"] = database["DAGSTER_PG_DB"]
    instance = instance_of(values)
    instance["run_launcher"]["config"] |= launcher
    (home / "dagster.yaml").write_text(yaml.safe_dump(instance))
