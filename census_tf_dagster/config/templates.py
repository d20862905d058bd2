"""``{{ env.NAME }}`` in the texts of a YAML file: the only template that is understood.

The text is searched with a regular expression and never evaluated: whoever may write a set's file must not run code.
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

NOT_UNDERSTOOD = (
    "{{ env.NAME }} is the only template that is understood. Close each {{ with }}, and write the value itself where "
    "it is not one variable of the environment"
)
HIDDEN = (
    "With its variables put in, the value is refused (it is not shown here). Check the variables where Dagster runs"
)


def is_template(value: object) -> bool:
    """Tell whether a value is a text with a template in it."""
    return isinstance(value, str) and any(opening in value for opening in OPENINGS)


def resolve_text(text: str) -> str:
    """Replace each ``{{ env.NAME }}`` by that variable of this process.

    Raises
    ------
    ValueError
        When a variable is not set, or the text has any other template.
    """
    if any(opening in VARIABLE.sub(" ", text) for opening in OPENINGS):
        raise ValueError(NOT_UNDERSTOOD)
    for name in VARIABLE.findall(text):
        if name not in os.environ:
            raise ValueError(
                f"The variable {name[:80]} is not set. Set it where Dagster runs, or write the value itself"
            )
    return VARIABLE.sub(lambda found: os.environ[found[1]], text)


def validate_resolved(value: Any, validate: Callable[[Any], T]) -> T:
    """Validate a value whose texts may hold templates.

    Parameters
    ----------
    value
        Texts, numbers, lists and mappings, as they were written.
    validate
        Gets the value with every variable put in; raises pydantic's ValidationError.

    Raises
    ------
    ValidationError
        Showing values as they were written: a variable may hold a secret.
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
    # Outside of the handler: the first error, which holds resolved values, must not be chained to this one.
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
        # What our own validators say may quote the value.
        context = {"error": ValueError(HIDDEN)}
    return InitErrorDetails(type=error["type"], loc=error["loc"], input=value, ctx=context)


def along(value: Any, where: Where) -> Iterator[tuple[str | int, Any]]:
    """Yield the keys and positions of an error that `value` has, each with what stands there.

    The others are pydantic's own: the member of a union, the mark of a key, or a key that is missing.
    """
    for part in where:
        inside = part in value if isinstance(value, dict) else isinstance(value, list) and part in range(len(value))
        if inside:
            value = value[part]
            yield part, value
