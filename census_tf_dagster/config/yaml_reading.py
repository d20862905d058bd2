"""Reads YAML files from untrusted authors. The values are the same as those of Dagster's own reader.

The reader checks the file's size, its depth and its number of values (aliases expanded) before it builds any value.
"""

import re
import stat
from dataclasses import dataclass
from pathlib import Path

import yaml

MOST_BYTES = 2**16
"""The largest file."""
MOST_VALUES = 5_000
"""The most values of a file. Each alias counts with everything it refers to."""
DEEPEST = 20
"""The most levels of a file."""

TEXT_REMEDY = (
    "Indent with spaces, close every bracket and quote, and put texts with ': ', '#', '{' or quotes in quotes."
)

SURROGATES = re.compile("[\ud800-\udfff]")
_NUMBER = re.compile(r"[-+]?(0|[1-9][0-9]{0,29})(\.[0-9]{1,30})?([eE][-+]?[0-9]{1,3})?")
"""A plain decimal number. YAML 1.1 also reads other texts as numbers: 010 is 8, 1:30 is 90, 1_0 is 10, .inf, .nan."""

_TIMESTAMP, _NUMBERS = "tag:yaml.org,2002:timestamp", ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class UnreadableError(Exception):
    """A file cannot be read as YAML. Has the line, the problem and the remedy."""

    def __init__(self, line: int, what: str, remedy: str) -> None:
        super().__init__(what)
        self.line, self.what, self.remedy = line, what, remedy


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """PyYAML's safe reader. Dates stay texts, as in Dagster's reader."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_text(file: Path) -> str:
    """Return the text of a small file in UTF-8, with the line ends of Python's text files.

    Raises
    ------
    UnreadableError
        When it is not a regular file, is too large, cannot be read, or is not UTF-8.
    """
    expected = f"Expected a YAML file in UTF-8 of at most {MOST_BYTES} bytes."
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            raise UnreadableError(1, "this is not a file", expected)
        if found.st_size > MOST_BYTES:
            raise UnreadableError(1, f"the file has {found.st_size} bytes", expected)
        content = file.read_bytes()
    except OSError as error:
        raise UnreadableError(1, f"the file cannot be read: {error.strerror}", expected) from None
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        byte = f"byte 0x{content[error.start]:02x}"
        raise UnreadableError(line, f"the file is not UTF-8 ({byte})", "Save it as UTF-8.") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def compose(text: str) -> list[yaml.Node]:
    """Return the documents of a YAML text as nodes.

    Raises
    ------
    UnreadableError
        When the text is not valid YAML, has too many values or levels, or has tags.
    """
    try:
        _check_bounds(text)
        return [node for node in yaml.compose_all(text, _Loader) if node is not None]
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise UnreadableError(line, f"the file has the character {chr(error.character)!r}", "Remove it.") from None
    except yaml.YAMLError as error:
        raise _invalid_yaml(text, error) from None


def construct(node: yaml.Node, text: str) -> object:
    """Return the value of a document.

    Raises
    ------
    UnreadableError
        When a part has no value, for example a mapping as a key.
    """
    loader = _Loader("")
    try:
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise _invalid_yaml(text, error) from None
    finally:
        loader.dispose()


def is_odd_number(node: yaml.Node) -> bool:
    """Tell whether YAML reads a value as a number although it is not a plain decimal number."""
    return isinstance(node, yaml.ScalarNode) and node.tag in _NUMBERS and not _NUMBER.fullmatch(node.value)


@dataclass
class _Size:
    """The number of values and levels of a part of a document, with its aliases expanded."""

    values: int = 1
    levels: int = 1

    def add(self, other: "_Size") -> None:
        self.values += other.values
        self.levels = max(self.levels, other.levels + 1)


def _check_bounds(text: str) -> None:
    """Count values and levels without building anything. Stop where the text gets too large."""
    anchors: dict[str, _Size | None] = {}
    open_parts: list[tuple[str | None, _Size]] = [(None, _Size())]
    for event in yaml.parse(text, _Loader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.DocumentStartEvent):
            anchors.clear()
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_parts.pop()
            if anchor:
                anchors[anchor] = size
            open_parts[-1][1].add(size)
        elif isinstance(event, yaml.NodeEvent):
            if getattr(event, "tag", None) is not None:
                shown = repr(event.tag)[:80]
                raise UnreadableError(line, f"the tag {shown} is not supported", "Remove it, and write the value.")
            if isinstance(event, yaml.AliasEvent):
                if event.anchor in anchors and anchors[event.anchor] is None:
                    raise UnreadableError(line, f"*{event.anchor[:80]} refers to itself", "Write the value.")
                open_parts[-1][1].add(anchors.get(event.anchor) or _Size())
            elif isinstance(event, yaml.CollectionStartEvent):
                if event.anchor:
                    anchors[event.anchor] = None
                open_parts.append((event.anchor, _Size()))
            else:
                if SURROGATES.search(event.value):
                    raise UnreadableError(line, "the file has half of a UTF-16 pair, such as \\ud800", "Remove it.")
                if event.anchor:
                    anchors[event.anchor] = _Size()
                open_parts[-1][1].add(_Size())
        if len(open_parts) > DEEPEST + 1 or open_parts[-1][1].levels > DEEPEST + 1:
            raise UnreadableError(line, f"the file nests deeper than {DEEPEST} levels", "Use fewer levels.")
        if sum(size.values for _, size in open_parts) > MOST_VALUES:
            expected = "A set needs fewer; each alias counts with everything it refers to."
            raise UnreadableError(line, f"the file has more than {MOST_VALUES} values", expected)


def _invalid_yaml(text: str, error: yaml.YAMLError) -> UnreadableError:
    mark = getattr(error, "problem_mark", None)
    lines = text.splitlines() or [""]
    line = min(mark.line, len(lines) - 1) if mark else 0
    said = " ".join(str(getattr(error, "problem", None) or error).split())[:120]
    found = " ".join(lines[line].split())
    shown = repr(found if len(found) <= 80 else f"{found[:80]}...")
    return UnreadableError(line + 1, f"this is not valid YAML: {said}, at {shown}", TEXT_REMEDY)
