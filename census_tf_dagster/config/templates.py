"""Replaces ``{{ env.NAME }}`` in the texts of a YAML file. No other template is supported.

The text is searched with a regular expression and never evaluated, so the author of a set's file cannot run code.
"""

import os
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails

T = TypeVar("T")

Where = tuple[str | int, ...]
"""Keys and list positions from the top of a value to a part of it."""

OPENINGS = ("{{", "{%", "{#")
VARIABLE = re.compile(r"\{\{[ \t]*env\.([A-Za-z_][A-Za-z0-9_]*)[ \t]*\}\}")

NOT_SUPPORTED = (
    "{{ env.NAME }} is the only template that is supported. Close each {{ with }}, and write anything else as a plain "
    "value"
)
HIDDEN = (
    "The value is invalid once its variables are inserted (it may hold a secret, so it is not shown). Check the "
    "variables where Dagster runs"
)


def is_template(value: object) -> bool:
    """Tell whether a value is a text that contains a template."""
    return isinstance(value, str) and any(opening in value for opening in OPENINGS)


def resolve_text(text: str) -> str:
    """Replace each ``{{ env.NAME }}`` by the value of that environment variable of this process.

    Raises
    ------
    ValueError
        When a variable is not set, or the text has another template.
    """
    if any(opening in VARIABLE.sub(" ", text) for opening in OPENINGS):
        raise ValueError(NOT_SUPPORTED)
    for name in VARIABLE.findall(text):
        if name not in os.environ:
            raise ValueError(
                f"The variable {name[:80]} is not set. Set it where Dagster runs, or write the value itself"
            )
    return VARIABLE.sub(lambda found: os.environ[found[1]], text)


def validate_resolved(value: Any, validate: Callable[[Any], T]) -> T:
    """Validate a value whose texts may contain templates.

    Parameters
    ----------
    value
        Texts, numbers, lists and mappings, as the author wrote them.
    validate
        Receives the value with its variables inserted, and raises pydantic's ValidationError when it is invalid.

    Raises
    ------
    ValidationError
        When the value is invalid. It shows values as the author wrote them, because a variable may hold a secret.
    """
    failures: list[InitErrorDetails] = []
    resolved = _resolve(value, (), failures)
    title = "templates"
    if not failures:
        try:
            return validate(resolved)
        except ValidationError as error:
            title = error.title
            failures = [_as_written(one, value) for one in error.errors(include_url=False)]
    # This is outside the handler, so that the first error, which holds inserted values, is not chained to this one.
    raise ValidationError.from_exception_data(title, failures)


def _resolve(value: Any, where: Where, failures: list[InitErrorDetails]) -> Any:
    if isinstance(value, dict):
        return {key: _resolve(one, (*where, key), failures) for key, one in value.items()}
    if isinstance(value, list):
        return [_resolve(one, (*where, i), failures) for i, one in enumerate(value)]
    if not is_template(value):
        return value
    try:
        return resolve_text(value)
    except ValueError as error:
        failures.append(InitErrorDetails(type="value_error", loc=where, input=value, ctx={"error": error}))
        return value


def _as_written(error: ErrorDetails, value: Any) -> InitErrorDetails:
    for _, found in along(value, error["loc"]):
        value = found
    context = error.get("ctx", {})
    if is_template(value) and error["type"] in ("value_error", "assertion_error"):
        # The messages of our own validators may quote the value.
        context = {"error": ValueError(HIDDEN)}
    return InitErrorDetails(type=error["type"], loc=error["loc"], input=value, ctx=context)


def along(value: Any, where: Where) -> Iterator[tuple[str | int, Any]]:
    """Yield the keys and positions of an error's location that exist in `value`, each with the value found there.

    The other parts of a location are pydantic's own: the member of a union, the mark of a key, or a missing key.
    """
    for part in where:
        inside = part in value if isinstance(value, dict) else isinstance(value, list) and part in range(len(value))
        if inside:
            value = value[part]
            yield part, value
