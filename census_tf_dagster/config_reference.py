"""Writes docs/configure.md: every field of sets, placement and publication, from the schema that loading uses.

Run ``python -m census_tf_dagster.config_reference > docs/configure.md`` (or `make docs`). A test compares the result
with the page. The descriptions of fields belong to the models; only the frame of the page is here.
"""

import re
import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from census_tf_dagster import definitions
from census_tf_dagster.config.placement import Placement
from census_tf_dagster.config.publication import Publication
from census_tf_dagster.config.yaml_problems import inner_model
from census_tf_dagster.embedding_set import EmbeddingSet, FileSet

INTRODUCTION = """# Configure

*For operators who declare the sets of a deployment: every field of the YAML files, and every environment variable.*

A set is one file, `FOLDER/<set>/defs.yaml`, in the deployment's folder of sets:

```yaml
type: census_tf_dagster.embedding_set.EmbeddingSet
attributes:
  name: mouse_exemplar
  organism: mus_musculus
  checkpoint: s3://models/tf_exemplar
  value_filter: is_primary_data == True
  shards: 96
```

Check the files after each change. The command prints all mistakes of all files at once, each with its file, line,
value and remedy; Dagster prints the same when it loads the files.

```bash
census-tf-dagster check
```

A text may contain `{{ env.NAME }}`: the value of an environment variable of the process that loads the file. No other
template is supported and nothing is evaluated, so the authors of these files cannot run code with them.

In an editor, Dagster's own `dg check yaml census_tf_dagster/defs/demo_human` reports file, line and value of the
mistakes that the schema alone can show. Name one set: without a name it checks only one file of each type.

*`make docs` writes this page from the schema that loading uses. To change a description, edit it in the code.*
"""
TITLES: dict[type[BaseModel], str] = {
    EmbeddingSet: "A set: `attributes`",
    FileSet: "A set of files: `attributes` ([own cells](embed.md#with-dagster))",
    Publication: "`publication` ([publish](publish.md))",
    Placement: "`placement`, in a set and in `FOLDER/placement.yaml` ([placement](placement.md))",
}


def configure_page() -> str:
    """Return the text of the page."""
    sections = [INTRODUCTION.rstrip()]
    written: set[type[BaseModel]] = set()
    for model, title in TITLES.items():
        for one in _with_inner(model):
            if one not in written:
                written.add(one)
                sections.append(_section(one, TITLES.get(one, title if one is model else f"`{one.__name__}`")))
    sections.append("## Variables\n\n" + _variables())
    return "\n\n".join(sections) + "\n"


def _with_inner(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield model
    for field in model.model_fields.values():
        found = inner_model(field.annotation)
        if found is not None and found not in TITLES:
            yield from _with_inner(found)


def _section(model: type[BaseModel], title: str) -> str:
    lines = [f"## {title}", ""]
    if model not in TITLES:
        lines += [_text(str(model.__doc__)), ""]
    lines += ["| field | value | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        kind = _kind(field.annotation) + _limits(field)
        lines.append(f"| `{name}` | {kind} | {_default(field)} | {_text(field.description or '')} |")
    return "\n".join(lines)


def _text(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|")


def _kind(annotation: Any) -> str:
    arguments = [one for one in get_args(annotation) if one is not type(None)]
    origin = get_origin(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"`{annotation.__name__}`"
    if origin is Literal:
        return " or ".join(f"`{one}`" for one in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(one) for one in arguments)
    if origin in (list, tuple):
        return f"list of {_kind(arguments[0])}"
    if origin is dict:
        return f"mapping of {_kind(arguments[0])} to {_kind(arguments[1])}"
    if arguments:  # Annotated
        return _kind(arguments[0])
    names = {"str": "text", "int": "number", "float": "number", "bool": "true or false"}
    return names.get(getattr(annotation, "__name__", ""), str(annotation))


def _limits(field: FieldInfo) -> str:
    words = {"ge": "at least", "gt": "above", "le": "at most", "min_length": "length at least", "max_length": "at most"}
    found = []
    unit = " entries" if get_origin(field.annotation) in (list, tuple, dict) else " characters"
    for limit in field.metadata:
        for name, word in words.items():
            if getattr(limit, name, None) is not None:
                found.append(f"{word} {getattr(limit, name)}{unit if name == 'max_length' else ''}")
    return f", {', '.join(found)}" if found else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    return "none" if value in (None, "", (), [], {}) else f"`{value}`"


def _variables() -> str:
    """Return the table of variables, taken from the docstring of `definitions`, where they are read."""
    rows = [line for line in str(definitions.__doc__).splitlines() if line.startswith("CENSUS_TF_")]
    parts = [re.split(r"\s{2,}", row.replace("``", "`").strip()) for row in rows]
    table = ["| variable | meaning | default |", "|---|---|---|"]
    table += [f"| `{name}` | {meaning} | {default} |" for name, meaning, default in parts]
    table += [
        "| `CENSUS_TF_DAGSTER_URL` | address of the webserver, for `launch`, `approve` and `status` "
        "| http://127.0.0.1:3000 |",
        "| `DAGSTER_HOME` | folder of the Dagster instance (Dagster's own) | none |",
    ]
    return "\n".join(
        [
            *table,
            "",
            "Credentials come from the environment or the role, as for every AWS tool. None of these variables holds",
            "any, and they never appear in run configuration, logs or metadata.",
        ]
    )


if __name__ == "__main__":
    print(configure_page(), end="")
