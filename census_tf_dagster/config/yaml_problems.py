"""Finds the mistakes in a YAML file, each with its file, line, value and remedy.

Here are the tools that any file needs: the mistakes of a pydantic model, repeated keys, odd numbers, and how a message
shows values. Rules for one kind of file belong to that kind (`set_files` for sets).
"""

import os
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from census_tf_dagster.config.templates import Where, along, validate_resolved
from census_tf_dagster.config.yaml_reading import UnreadableError, compose, construct, is_odd_number, read_text
from census_tf_dagster.errors import UserError

Model = TypeVar("Model", bound=BaseModel)

LONGEST_VALUE = 80
"""How many characters of a value a message shows."""


@dataclass(frozen=True)
class Problem:
    """One mistake in a file.

    Attributes
    ----------
    file, line
        Its place; the first line is 1.
    what
        The entry, and the value that was found.
    remedy
        What was expected, and what to write instead.
    """

    file: Path
    line: int
    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.what}. {self.remedy}"


class Document:
    """One YAML document of a file, with the line of each of its values."""

    def __init__(self, file: Path, node: yaml.Node, value: object) -> None:
        self.file = file
        self.node = node
        self.value: Any = value

    def problem(self, where: Where, what: str, remedy: str, *, key: bool = False) -> Problem:
        """Return a problem at a value or at its key; its line is that of the nearest parent if neither exists."""
        return Problem(self.file, self._line(where, key=key), what, remedy)

    def repeated_keys(self) -> Iterator[Problem]:
        """Yield a problem for each key that a mapping has twice. YAML's reader would silently use the last one."""
        pending: list[tuple[yaml.Node, str]] = [(self.node, "")]
        while pending:
            node, path = pending.pop()
            if isinstance(node, yaml.SequenceNode):
                pending += [(one, path) for one in node.value]
            if not isinstance(node, yaml.MappingNode):
                continue
            lines: dict[str, int] = {}
            for key, value in node.value:
                name = f"{path}{spell(str(key.value))}"
                line = key.start_mark.line + 1
                if name in lines:
                    what = f"{name} is given twice, first in line {lines[name]}"
                    yield Problem(self.file, line, what, "Keep one of the two.")
                lines[name] = line
                pending.append((value, f"{name}."))

    def _line(self, where: Where, *, key: bool) -> int:
        node, line = self.node, self.node.start_mark.line
        for part in where:
            found = _child(node, part)
            if found is None:
                break
            name, node = found
            # The line of a text that has several lines is the line of its key.
            line = (name if key or isinstance(node, yaml.ScalarNode) else node).start_mark.line
        return int(line) + 1


def _child(node: yaml.Node, part: Hashable) -> tuple[yaml.Node, yaml.Node] | None:
    if isinstance(node, yaml.MappingNode):
        return next(((key, value) for key, value in node.value if key.value == part), None)
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part], node.value[part]
    return None


def read_documents(file: Path) -> tuple[list[Document], list[Problem]]:
    """Read a YAML file. If it cannot be read, or has numbers that are not plain decimals, return only the problems."""
    try:
        text = read_text(file)
        nodes = compose(text)
        if odd := [one for node in nodes for one in _odd_numbers(file, node)]:
            return [], odd
        return [Document(file, node, construct(node, text)) for node in nodes], []
    except UnreadableError as error:
        return [], [Problem(file, error.line, error.what, error.remedy)]


def _odd_numbers(file: Path, top: yaml.Node) -> Iterator[Problem]:
    for node in _nodes(top):
        if is_odd_number(node):
            remedy = "Write plain decimal digits such as 8 or 1.5, or put it in quotes if it is meant as text."
            yield Problem(
                file,
                node.start_mark.line + 1,
                f"{show(node.value)} is not a plain decimal number of at most 30 digits",
                remedy,
            )


def _nodes(top: yaml.Node) -> Iterator[yaml.Node]:
    """Yield each node once."""
    pending, seen = [top], set[int]()
    while pending:
        node = pending.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, yaml.MappingNode):
            pending += [one for pair in node.value for one in pair]
        elif isinstance(node, yaml.SequenceNode):
            pending += node.value


def mapping_problems(file: Path, model: type[BaseModel], page: str) -> list[Problem]:
    """Return the problems of a file that should hold one mapping (`page` shows one); none when there is no file."""
    if not os.path.lexists(file):
        return []
    documents, problems = read_documents(file)
    if problems:
        return problems
    if len(documents) != 1 or not isinstance(documents[0].value, dict):
        found = documents[0].value if len(documents) == 1 else f"{len(documents)} documents"
        return [Problem(file, 1, f"the file is {show(found)}", f"It should be one mapping; {page} shows an example.")]
    document = documents[0]
    return [*document.repeated_keys(), *model_problems(document, model, _resolving(model), document.value)]


def read_mapping(file: Path, model: type[Model], page: str) -> Model | None:
    """Read a file that should hold one mapping; None when there is no file.

    Raises
    ------
    UserError
        When the file has mistakes. The message gives file, line, value and remedy of each.
    """
    if problems := mapping_problems(file, model, page):
        raise UserError("\n".join(map(str, problems)))
    if not os.path.lexists(file):
        return None
    return _resolving(model)(read_documents(file)[0][0].value)


def _resolving(model: type[Model]) -> Callable[[object], Model]:
    return lambda value: validate_resolved(value, model.model_validate)


def show(value: object) -> str:
    """Return a value for a message: short, on one line, without passwords in addresses."""
    text = re.sub(r"://[^/\s]*@", "://***@", re.sub(r"\s+", " ", repr(value)))
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}..."


def spell(name: str) -> str:
    """Return a key for a message: as it is, or as `show` does when it is long or has odd characters."""
    return name if re.fullmatch(r"[\w./-]{1,80}", name) else show(name)


def nearest(name: str, known: Sequence[str]) -> str:
    """Return a suggestion for an unknown name: the most similar known name, else all of them."""
    lower = {one.lower(): one for one in known}
    close = get_close_matches(name.lower(), lower, n=1, cutoff=0.6)
    return f"Did you mean {lower[close[0]]}?" if close else f"Known are: {', '.join(known)}."


def model_problems(
    document: Document,
    model: type[BaseModel],
    validate: Callable[[object], object],
    value: object,
    prefix: Where = (),
) -> list[Problem]:
    """Return the problems that a pydantic model's function `validate` finds in the value at `prefix`."""
    try:
        validate(value)
    except ValidationError as error:
        found = {(_parts(value, one), "[key]" in one["loc"]): one for one in reversed(error.errors(include_url=False))}
        return [
            _explain(document, model, one, parts, prefix)
            for (parts, of_key), one in reversed(found.items())
            # Each member of a union reports its own errors. An error of an inner part is the most helpful one.
            if of_key or not any(len(other) > len(parts) and other[: len(parts)] == parts for other, _ in found)
        ]
    return []


def _parts(value: object, error: ErrorDetails) -> Where:
    """Return the keys and positions that lead from a value to the part that an error is about."""
    parts = tuple(part for part, _ in along(value, error["loc"]))
    return (*parts, error["loc"][-1]) if error["type"] == "missing" else parts


def _explain(document: Document, model: type[BaseModel], error: ErrorDetails, parts: Where, prefix: Where) -> Problem:
    where = (*prefix, *parts)
    name = ".".join(spell(str(part)) for part in where) or "the file"
    if error["type"] == "extra_forbidden":
        owner, _ = _find(model, parts[:-1])
        known = list(owner.model_fields) if owner else []
        return document.problem(where, f"{name} is unknown", nearest(str(parts[-1]), known), key=True)
    _, field = _find(model, parts)
    meaning = f" {field.description}" if field is not None and field.description else ""
    if error["type"] == "missing":
        return document.problem(where, f"{name} is missing", f"Add it.{meaning}")
    expected = re.sub(r"^(Input|Value error,|String) ?", "", error["msg"]).strip()
    if error["type"] in ("model_type", "dict_type"):
        expected = "should be a mapping"
    expected = f"It {expected}" if expected.startswith("should") else expected[:1].upper() + expected[1:]
    what = f"{name} is {show(error['input'])}"
    return document.problem(where, what, f"{expected.rstrip('.')}.{meaning}", key="[key]" in error["loc"])


def _find(model: type[BaseModel], parts: Where) -> tuple[type[BaseModel] | None, FieldInfo | None]:
    """Return the model and the field at a path; None where the path leaves the model."""
    owner: type[BaseModel] | None = model
    field: FieldInfo | None = None
    for part in parts:
        if owner is not None and part in owner.model_fields:
            field = owner.model_fields[str(part)]
            owner = inner_model(field.annotation)
    return owner, field


def inner_model(annotation: Any) -> type[BaseModel] | None:
    """Return the model in an annotation such as ``dict[str, Model] | None``; None when it has no model."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for one in getattr(annotation, "__args__", ()):
        if found := inner_model(one):
            return found
    return None
