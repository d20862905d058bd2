"""A deployment's policy for old plans and arrays: ``retention.yaml`` in the folder of sets.

Without that file everything is kept. `store.prune` applies the policy.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from census_tf_dagster.config.yaml_problems import read_mapping

FILE, PAGE = "retention.yaml", "docs/releases.md"
"""The file in the folder of sets, and the page that shows an example."""


class Retention(BaseModel):
    """What to do with old plans and arrays."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    policy: Literal["keep", "expire", "archive"] = Field(
        default="keep",
        description="keep: nothing is removed. expire: old plans and arrays are "
        "deleted. archive: they move to a cheaper S3 storage class.",
    )
    releases: int = Field(
        default=2, ge=1, le=10_000, description="How many of the newest releases of each set stay untouched."
    )
    days: int = Field(
        default=30, ge=1, le=36_525, description="Arrays that were written to within this many days stay untouched."
    )


def read_retention(folder: Path) -> Retention:
    """Read the policy of a deployment from its folder of sets.

    Raises
    ------
    UserError
        When the file has mistakes. The message gives file, line, value and remedy of each.
    """
    return read_mapping(folder / FILE, Retention, PAGE) or Retention()
