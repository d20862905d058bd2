"""What a published embedding says of itself: the array metadata `CxG_embedding_info`, and `meta.yml` beside the array.

Fields and limits are those of the Census's tool for contributed embeddings (`tools/census_contrib` in the
cellxgene-census repository: `embedding_metadata.md`, `metadata.py`). Whether DOI and links resolve, that tool asks.
"""

import re
from datetime import date
from typing import Annotated, Any

from pydantic import AfterValidator, AnyUrl, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, UrlConstraints

from census_tf_dagster.config.field_types import Line, Lines, Name

INFO_KEY = "CxG_embedding_info"
"""Array metadata key under which consumers look."""

_LINK: TypeAdapter[AnyUrl] = TypeAdapter(
    Annotated[AnyUrl, UrlConstraints(allowed_schemes=["http", "https", "s3"], host_required=True)]
)


def _iso_date(value: object) -> object:
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, str) and re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", value):
        return date.fromisoformat(value).isoformat()
    raise ValueError("It should be a day written as YYYY-MM-DD")


def _link(value: str) -> str:
    if value and (_LINK.validate_python(value).username or "@" in value.partition("//")[2].partition("/")[0]):
        raise ValueError("It should be an address without user and password, as everybody can read it")
    return value


class Contact(BaseModel):
    """A person to write to."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Name = Field(description="Their name.")
    email: Line = Field(pattern=r"^[^@\s]+@[^@\s]+\.[^@\s]+$", description="An address such as ada@example.org.")
    affiliation: Name = Field(description="Where they work.")


class Publication(BaseModel):
    """What a set's YAML says for publication; the rest follows from the release and the array."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: Line = Field(
        max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="Accession, such as CxG-contrib-17."
    )
    embedding_name: Line = Field(
        max_length=100, pattern=r"^[A-Za-z0-9_.-]+$", description="Short name that users ask for."
    )
    title: Name = Field(max_length=127, description="One line, at most 127 characters.")
    description: Lines = Field(
        min_length=1, pattern=r"\S", max_length=2047, description="The method, and what the embeddings are good for."
    )
    primary_contact: Contact = Field(description="Who answers questions.")
    additional_contacts: tuple[Contact, ...] = Field(
        default=(), strict=False, max_length=100, description="Others who do."
    )
    DOI: Line = Field(default="", pattern=r"^(10\.\d{4,9}/\S+)?$", description="A bare DOI, not a URL.")
    additional_information: Lines = Field(default="", description="Anything more, as text.")
    model_link: Annotated[Line, AfterValidator(_link)] = Field(
        default="", description="Address of the model (http, https or s3)."
    )
    submission_date: Annotated[str, BeforeValidator(_iso_date)] | None = Field(
        default=None, description="YYYY-MM-DD; left out: the day on which the array is finished."
    )

    def embedding_info(
        self, *, release: str, organism: str, measurement: str, n_embeddings: int, n_features: int, finished: date
    ) -> dict[str, Any]:
        """Return the whole of `CxG_embedding_info`.

        Parameters
        ----------
        release, organism, measurement
            Census version, experiment and measurement that were embedded.
        n_embeddings, n_features
            Embedded cells and values of each, as they are in the array.
        finished
            The submission date, unless the set's YAML gives one.
        """
        return {
            **self.model_dump(mode="json"),
            "data_type": "obs_embedding",
            "census_version": release,
            "experiment_name": organism,
            "measurement_name": measurement,
            "n_embeddings": n_embeddings,
            "n_features": n_features,
            "submission_date": self.submission_date or finished.isoformat(),
        }
