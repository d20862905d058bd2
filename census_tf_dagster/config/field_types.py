"""The types of text fields in YAML files. They limit the length and refuse control characters."""

from typing import Annotated

from pydantic import AfterValidator, Field

from census_tf_dagster.io.names import CONTROL_CHARACTERS, check_location

LONGEST_LINE, LONGEST_TEXT = 1024, 10_000
"""In characters. pydantic's `max_length` is not used here, because it would replace a smaller limit of the field."""


def _one_line(text: str) -> str:
    _check_length(text, LONGEST_LINE)
    if CONTROL_CHARACTERS.search(text):
        raise ValueError("It has a control character or line break. Write it on one line")
    return text


def _lines(text: str) -> str:
    _check_length(text, LONGEST_TEXT)
    if CONTROL_CHARACTERS.search(text.translate({ord("\n"): None, ord("\t"): None})):
        raise ValueError("It has a control character. Remove it")
    return text


def _check_length(text: str, longest: int) -> None:
    if len(text) > longest:
        raise ValueError(f"It has {len(text)} characters. Expected at most {longest}")


def _location(text: str) -> str:
    check_location(text)
    return text


Line = Annotated[str, AfterValidator(_one_line)]
"""A text of one line. It may be empty."""

Name = Annotated[Line, Field(min_length=1, pattern=r"\S")]
"""A text of one line that is not blank."""

Lines = Annotated[str, AfterValidator(_lines)]
"""A text that may have several lines."""

Location = Annotated[str, AfterValidator(_location)]
"""A local path, or an S3 prefix or object."""
