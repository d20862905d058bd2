"""A project whose store is on S3."""

import os

from tests.support.moto_servers import REGION
from tests.support.project import Project


def reader_config(endpoint: str) -> dict[str, str]:
    """The configuration that another reader needs; it uses nothing of ours."""
    return {
        "vfs.s3.endpoint_override": endpoint.removeprefix("http://"),
        "vfs.s3.scheme": "http",
        "vfs.s3.use_virtual_addressing": "false",
        "vfs.s3.region": REGION,
    }


def on_s3(project: Project, endpoint: str, bucket: str = "the-store") -> Project:
    """Put the store of a project on S3, in a bucket that does not exist yet."""
    project.env |= {
        "CENSUS_TF_STORE": f"s3://{bucket}/some/prefix",
        "CENSUS_TF_STORE_S3_ENDPOINT": endpoint,
        "CENSUS_TF_STORE_S3_REGION": REGION,
        "AWS_ACCESS_KEY_ID": os.environ["AWS_ACCESS_KEY_ID"],
        "AWS_SECRET_ACCESS_KEY": os.environ["AWS_SECRET_ACCESS_KEY"],
    }
    return project
