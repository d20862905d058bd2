"""A deployment's policy for old plans and arrays: ``retention.yaml`` in the folder of sets; without it all is kept."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from census_tf_dagster.config.yaml_problems import read_mapping

FILE, PAGE = "retention.yaml", "docs/releases.md"
"""In the folder of sets, and what shows it."""


class Retention(BaseModel):
    """What becomes of old plans and arrays."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    policy: Literal["keep", "expire", "archive"] = Field(
        default="keep", description="expire deletes; archive moves to a cheaper storage class of S3."
    )
    releases: int = Field(
        default=2, ge=1, le=10_000, description="The newest releases of each set that stay as they are."
    )
    days: int = Field(default=30, ge=1, le=36_525, description="What was written to in so many days stays as it is.")


def read_retention(folder: Path) -> Retention:
    """Read the policy of a deployment from its folder of sets.

    Raises
    ------
    UserError
        Naming file, line, value and remedy of each mistake.
    """
    return read_mapping(folder / FILE, Retention, PAGE) or Retention()
