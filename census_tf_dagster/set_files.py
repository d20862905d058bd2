"""Checks the files of a deployment's sets before Dagster loads them, and reports all mistakes at once with remedies.

`dg check yaml` checks only the schema. This module also checks what the schema cannot express: names used twice,
templates, filters, placement, and files that Dagster would ignore. It suggests what to write instead.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from census_tf_dagster.config import placement, retention
from census_tf_dagster.config.placement import Placement, read_placement, shard_tags
from census_tf_dagster.config.retention import Retention
from census_tf_dagster.config.yaml_problems import (
    Document,
    Problem,
    mapping_problems,
    model_problems,
    nearest,
    read_documents,
    show,
    spell,
)
from census_tf_dagster.config.yaml_reading import UnreadableError, read_text
from census_tf_dagster.embedding_set import EmbeddingSet, FileSet
from census_tf_dagster.errors import UserError

Component = type[EmbeddingSet] | type[FileSet]
TYPES: dict[str, Component] = {f"{one.__module__}.{one.__name__}": one for one in (EmbeddingSet, FileSet)}
TYPE, TYPE_OF_FILES = TYPES
TOP = ("type", "attributes", "requirements")
"""The keys that a set's file may have at its top level. Dagster allows more."""
SET_FILE = "defs.yaml"
COMPONENT_FILES = (SET_FILE, "defs.yml", "component.yaml")
"""The file names that Dagster loads in any folder."""
MOST_SHOWN = 20
"""The most mistakes of one file that are shown."""
MOST_ENTRIES, DEEPEST_FOLDER = 10_000, 20
"""The size above which a folder is not a folder of sets."""
CODE = ("template_vars_module", "post_processing")
"""Keys that Dagster allows and we refuse, because both can run code. Dagster imports the first, and evaluates templates
in the second."""


class _Requirements(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    env: list[str] = Field(description="Variables that must be set.")


def require_right_files(folder: Path) -> None:
    """Refuse a folder of sets that has any mistake.

    Raises
    ------
    UserError
        When there are mistakes, each with file, line, value and remedy; or when there are no sets.
    """
    problems = find_problems(folder)
    if problems:
        count = f"{len(problems)} mistakes" if len(problems) > 1 else "a mistake"
        raise UserError("\n  ".join([f"the sets in {folder} have {count}:", *map(str, problems)]))


def find_problems(folder: Path) -> list[Problem]:
    """Return every mistake in the files of a folder of sets.

    Raises
    ------
    UserError
        When the folder does not exist, or has no set.
    """
    expected = f"expected files such as {folder}/human_tf_sapiens/defs.yaml (CENSUS_TF_SETS names the folder)"
    if not folder.is_dir():
        raise UserError(f"the folder of sets {folder} does not exist; {expected}.")
    files, problems = _files_of_sets(folder)
    if not files and not problems:
        raise UserError(f"no sets in {folder}: {expected}.")
    wrong_placement = mapping_problems(folder / placement.FILE, Placement, placement.PAGE)
    problems += wrong_placement
    problems += mapping_problems(folder / retention.FILE, Retention, retention.PAGE)
    named: dict[str, Problem] = {}
    for file in files:
        found: list[Problem] = []
        documents, unreadable = read_documents(file)
        found += unreadable
        if not documents and not unreadable:
            remedy = f"It needs `type: {TYPE}` and `attributes:`; docs/configure.md shows a complete example."
            found.append(Problem(file, 1, "the file is empty", remedy))
        for document in documents:
            own = list(_document_problems(document))
            found += own or ([] if wrong_placement else _placement_of_set(document, folder))
            found += _named_before(document, named, resolved=not own)
        problems += _at_most(found)
    return problems


def _at_most(found: list[Problem]) -> list[Problem]:
    if len(found) <= MOST_SHOWN:
        return found
    more = Problem(found[0].file, 1, f"the file has {len(found) - MOST_SHOWN} more mistakes", "Correct these first.")
    return [*found[:MOST_SHOWN], more]


def _files_of_sets(folder: Path) -> tuple[list[Path], list[Problem]]:
    """Return the files of sets, and a problem for each file that Dagster would ignore, or load without these checks."""
    files: list[Path] = []
    problems: list[Problem] = []
    entries = 0
    for parent, folders, names in os.walk(folder, followlinks=True):
        here = Path(parent)
        entries += len(folders) + len(names)
        if entries > MOST_ENTRIES or len(here.relative_to(folder).parts) > DEEPEST_FOLDER:
            raise UserError(
                f"the folder of sets {folder} holds more than {MOST_ENTRIES} entries or {DEEPEST_FOLDER} levels; "
                f"expected a folder of files such as {folder}/human_tf_sapiens/defs.yaml. Set CENSUS_TF_SETS to it."
            )
        # Dagster ignores the same folders. A mounted ConfigMap has a folder ..data.
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in sorted([*names, *folders]):
            path = here / name
            if name == SET_FILE and here.parent == folder:
                files.append(path)
            elif name in COMPONENT_FILES or (name in names and not name.startswith(".") and _is_set(path)):
                right = (folder / path.stem if here == folder else here) / SET_FILE
                where = (
                    f"a set in a file named {name} is not loaded"
                    if here.parent == folder or here == folder
                    else "a set in a folder inside a set's folder is not loaded"
                )
                problems.append(Problem(path, 1, where, f"Name it {right}."))
    return files, problems


def _is_set(path: Path) -> bool:
    if path.suffix not in (".yaml", ".yml"):
        return False
    try:
        text = read_text(path)
    except UnreadableError:
        return False
    return any(f"type: {name}" in text for name in TYPES)


def _component_of(content: dict[str, Any]) -> Component:
    """Return the component that a document declares; the most likely one if its type is wrong."""
    named = content.get("type")
    if isinstance(named, str) and named in TYPES:
        return TYPES[named]
    attributes = content.get("attributes")
    return FileSet if isinstance(attributes, dict) and "files" in attributes else EmbeddingSet


def _document_problems(document: Document) -> Iterator[Problem]:
    content = document.value
    if not isinstance(content, dict):
        found = f"the file is {show(content)}"
        yield document.problem((), found, f"It should be a mapping with `type: {TYPE}` and `attributes:`.")
        return
    component = _component_of(content)
    yield from document.repeated_keys()
    for name in content:
        if name in CODE:
            remedy = "Remove it. A set's file may hold values and {{ env.NAME }}, and no code."
            yield document.problem((name,), f"{name} is not supported, because it can run code", remedy, key=True)
        elif name not in TOP:
            in_set = name in component.model_fields
            remedy = "Indent it below attributes." if in_set else nearest(str(name), TOP)
            yield document.problem((name,), f"{spell(str(name))} is unknown at the top of the file", remedy, key=True)
    if TYPES.get(str(content.get("type"))) is None:
        what = f"type is {show(content['type'])}" if "type" in content else "type is missing"
        remedy = f"Write `type: {TYPE}`, or `type: {TYPE_OF_FILES}` for a set of files."
        yield document.problem(("type",), what, remedy)
    if "requirements" in content:
        required = content["requirements"]
        yield from model_problems(document, _Requirements, _Requirements.model_validate, required, ("requirements",))
    attributes = content.get("attributes")
    if not isinstance(attributes, dict):
        what = f"attributes is {show(attributes)}" if "attributes" in content else "attributes is missing"
        required = ", ".join(name for name, field in component.model_fields.items() if field.is_required())
        yield document.problem(("attributes",), what, f"It should be a mapping with at least {required}.")
        return
    yield from model_problems(document, component, component.model_validate, attributes, ("attributes",))


def _placement_of_set(document: Document, folder: Path) -> list[Problem]:
    """Return the problems of a set's own placement together with the deployment's."""
    attributes = document.value["attributes"]
    one = _component_of(document.value).model_validate(attributes)
    try:
        shard_tags(one.device, one.placement, read_placement(folder))
    except UserError as error:
        what = str(error).removeprefix("placement: ").rstrip(".")
        own = ("attributes", "placement") if one.placement else ("attributes",)
        remedy = f"Change or add it in this set's placement, or in {folder / placement.FILE}."
        return [document.problem(own, what, remedy)]
    try:
        one.placed(read_placement(folder))
    except UserError:
        what = f"attributes.auto_start is {show(attributes['auto_start'])}; the price of a GPU hour is unknown"
        remedy = f"Set usd_per_gpu_hour in {folder / placement.FILE}, or in this set's own placement."
        return [document.problem(("attributes", "auto_start"), what, remedy)]
    return []


def _named_before(document: Document, named: dict[str, Problem], *, resolved: bool) -> list[Problem]:
    attributes = document.value.get("attributes") if isinstance(document.value, dict) else None
    written = attributes.get("name") if isinstance(attributes, dict) else None
    if not isinstance(written, str):
        return []
    name = _component_of(document.value).model_validate(attributes).name if resolved else written
    here = document.problem(("attributes", "name"), f"attributes.name is {show(written)}", "")
    first = named.setdefault(name, here)
    if first is here:
        return []
    what = f"{here.what}, and the set in {first.file}:{first.line} has the same name"
    return [Problem(here.file, here.line, what, "Give one of them another name.")]
