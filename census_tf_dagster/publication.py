"""What a published embedding says of itself: the array metadata `CxG_embedding_info`, and `meta.yml` beside the array.

Fields and limits are those of the Census's tool for contributed embeddings (`tools/census_contrib` in the
cellxgene-census repository: `embedding_metadata.md`, `metadata.py`). Whether DOI and links resolve, that tool asks.
"""

from datetime import date
from typing import Annotated, Any

from pydantic import AnyUrl, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter

INFO_KEY = "CxG_embedding_info"
"""Array metadata key under which consumers look."""

Text = Annotated[str, Field(min_length=1, pattern=r"\S")]


def _iso_date(value: object) -> object:
    # YAML reads an unquoted date as one.
    return value.isoformat() if isinstance(value, date) else str(date.fromisoformat(str(value)))


def _link(value: object) -> object:
    if value:
        TypeAdapter(AnyUrl).validate_python(value)
    return value


class Contact(BaseModel):
    """A person to write to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Text = Field(description="Their name.")
    email: str = Field(pattern=r"^[^@\s]+@[^@\s]+\.[^@\s]+$", description="An address such as ada@example.org.")
    affiliation: Text = Field(description="Where they work.")


class Publication(BaseModel):
    """What a set's YAML says for publication; the rest follows from the release and the array."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="Accession, such as CxG-contrib-17.")
    embedding_name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="Short name that users ask for.")
    title: Text = Field(max_length=127, description="One line, at most 127 characters.")
    description: Text = Field(max_length=2047, description="The method, and what the embeddings are good for.")
    primary_contact: Contact = Field(description="Who answers questions.")
    additional_contacts: tuple[Contact, ...] = Field(default=(), description="Others who do.")
    DOI: str = Field(default="", pattern=r"^(10\.\d{4,9}/\S+)?$", description="A bare DOI, not a URL.")
    additional_information: str = Field(default="", description="Anything more, as text.")
    model_link: Annotated[str, BeforeValidator(_link)] = Field(default="", description="URL of the model.")
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
