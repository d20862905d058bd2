"""The description of a published embedding: the array metadata `CxG_embedding_info`, and `meta.yml` beside the array.

The fields and limits are those of the Census's tool for contributed embeddings (`tools/census_contrib` in the
cellxgene-census repository: `embedding_metadata.md`, `metadata.py`). That tool also checks whether DOI and links
resolve; this module does not.
"""

import re
from datetime import date
from typing import Annotated, Any

from pydantic import AfterValidator, AnyUrl, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, UrlConstraints

from census_tf_dagster.config.field_types import Line, Lines, Name

INFO_KEY = "CxG_embedding_info"
"""The key of the array metadata that consumers read."""

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
        raise ValueError("It should be an address without user and password, because everybody can read it")
    return value


class Contact(BaseModel):
    """A person who can be contacted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Name = Field(description="Name of the person.")
    email: Line = Field(pattern=r"^[^@\s]+@[^@\s]+\.[^@\s]+$", description="An address such as ada@example.org.")
    affiliation: Name = Field(description="Institution of the person.")


class Publication(BaseModel):
    """The part of `CxG_embedding_info` that the set's YAML gives; the release and the array give the rest."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    id: Line = Field(
        max_length=100, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="Accession, such as CxG-contrib-17."
    )
    embedding_name: Line = Field(
        max_length=100, pattern=r"^[A-Za-z0-9_.-]+$", description="Short name by which users request the embedding."
    )
    title: Name = Field(max_length=127, description="One line, at most 127 characters.")
    description: Lines = Field(
        min_length=1,
        pattern=r"\S",
        max_length=2047,
        description="The method, and the purposes for which the embeddings are suitable.",
    )
    primary_contact: Contact = Field(description="The person who answers questions.")
    additional_contacts: tuple[Contact, ...] = Field(
        default=(), strict=False, max_length=100, description="Other people who answer questions."
    )
    DOI: Line = Field(default="", pattern=r"^(10\.\d{4,9}/\S+)?$", description="A bare DOI, not a URL.")
    additional_information: Lines = Field(default="", description="Further information, as text.")
    model_link: Annotated[Line, AfterValidator(_link)] = Field(
        default="", description="Address of the model (http, https or s3)."
    )
    submission_date: Annotated[str, BeforeValidator(_iso_date)] | None = Field(
        default=None, description="Date as YYYY-MM-DD. Default: the day on which the array is finished."
    )

    def embedding_info(
        self, *, release: str, organism: str, measurement: str, n_embeddings: int, n_features: int, finished: date
    ) -> dict[str, Any]:
        """Return the complete `CxG_embedding_info`.

        Parameters
        ----------
        release, organism, measurement
            Census version, experiment and measurement of the cells.
        n_embeddings, n_features
            Embedded cells in the array, and values of each.
        finished
            The submission date if the set's YAML gives none.
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
