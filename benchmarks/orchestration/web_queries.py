"""The GraphQL queries of Dagster's web interface, as the installed `dagster-webserver` ships them."""

import json
import re
from importlib.util import find_spec
from pathlib import Path


def read_queries(*names: str) -> dict[str, str]:
    """Return the texts of some of the web interface's queries, each with the fragments that it uses.

    They are read from the source maps of its JavaScript.
    """
    (package,) = find_spec("dagster_webserver").submodule_search_locations  # type: ignore[union-attr,misc]
    definitions: dict[str, str] = {}
    for path in (Path(package) / "webapp" / "build" / "_next").rglob("*.js.map"):
        for source in json.loads(path.read_text()).get("sourcesContent") or ():
            for document in re.findall(r"gql`(.*?)`", source or "", re.DOTALL):
                for text in re.split(r"^  (?=query |fragment )", re.sub(r"\$\{.*?\}", "", document), flags=re.M):
                    if found := re.match(r"(?:query|fragment) (\w+)", text):
                        definitions[found[1]] = text
    queries = {}
    for name in names:
        needed, texts = [name], {}
        while needed:
            one = needed.pop()
            texts[one] = definitions[one]
            needed += {used for used in re.findall(r"\.\.\.(\w+)", texts[one]) if used != "on"} - texts.keys()
        queries[name] = "\n".join(texts.values())
    return queries
