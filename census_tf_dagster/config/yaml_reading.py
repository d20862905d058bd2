"""Reading YAML that anybody may have written: within small bounds, and with the values that Dagster's own reader gives.

Nothing is built before the file's size, depth and number of values, aliases included, are known to be small.
"""

import re
import stat
from dataclasses import dataclass
from pathlib import Path

import yaml

MOST_BYTES = 2**16
MOST_VALUES = 5_000
"""Of a file, each alias counted with all that it stands for."""
DEEPEST = 20

TEXT_REMEDY = "Indent with spaces, close what was opened, and put texts with ': ', '#', '{' or quotes in quotes."

SURROGATES = re.compile("[\ud800-\udfff]")
_NUMBER = re.compile(r"[-+]?(0|[1-9][0-9]{0,29})(\.[0-9]{1,30})?([eE][-+]?[0-9]{1,3})?")
"""YAML 1.1 reads more as numbers: 010 is 8, 1:30 is 90, 1_0 is 10, and .inf and .nan are none."""

_TIMESTAMP, _NUMBERS = "tag:yaml.org,2002:timestamp", ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class UnreadableError(Exception):
    """A file that cannot be read as YAML: the line, what is wrong, and the remedy."""

    def __init__(self, line: int, what: str, remedy: str) -> None:
        super().__init__(what)
        self.line, self.what, self.remedy = line, what, remedy


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """PyYAML's safe reader, which leaves dates texts, as Dagster's does."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _TIMESTAMP]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_text(file: Path) -> str:
    """Return the text of a small file in UTF-8, with line ends as Python's text files have them.

    Raises
    ------
    UnreadableError
        When it is no such file.
    """
    expected = "Expected a YAML file in UTF-8."
    try:
        found = file.stat()
        if not stat.S_ISREG(found.st_mode):
            raise UnreadableError(1, "this is not a file", expected)
        if found.st_size > MOST_BYTES:
            raise UnreadableError(1, f"the file has {found.st_size} bytes", f"It can have {MOST_BYTES}. {expected}")
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
        When it is no YAML, or too large, too deep, or has tags.
    """
    try:
        _check_bounds(text)
        return [node for node in yaml.compose_all(text, _Loader) if node is not None]
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise UnreadableError(line, f"the file has the character {chr(error.character)!r}", "Remove it.") from None
    except yaml.YAMLError as error:
        raise _no_yaml(text, error) from None


def construct(node: yaml.Node, text: str) -> object:
    """Return the value of a document.

    Raises
    ------
    UnreadableError
        When a part has no value, such as a mapping that is a key.
    """
    loader = _Loader("")
    try:
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise _no_yaml(text, error) from None
    finally:
        loader.dispose()


def is_odd_number(node: yaml.Node) -> bool:
    """Tell whether YAML reads a value as a number that people would not, or would read as another one."""
    return isinstance(node, yaml.ScalarNode) and node.tag in _NUMBERS and not _NUMBER.fullmatch(node.value)


@dataclass
class _Size:
    """Values and levels of a part of a document, with its aliases expanded."""

    values: int = 1
    levels: int = 1

    def add(self, other: "_Size") -> None:
        self.values += other.values
        self.levels = max(self.levels, other.levels + 1)


def _check_bounds(text: str) -> None:
    """Go through the text without building anything, and stop where it gets too large."""
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
                raise UnreadableError(line, f"the tag {shown} is not understood", "Remove it, and write the value.")
            if isinstance(event, yaml.AliasEvent):
                if event.anchor in anchors and anchors[event.anchor] is None:
                    raise UnreadableError(line, f"*{event.anchor[:80]} stands within itself", "Write the value.")
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
            raise UnreadableError(line, f"the file nests deeper than {DEEPEST} levels", "Write it flatter.")
        if sum(size.values for _, size in open_parts) > MOST_VALUES:
            expected = "A set needs fewer; aliases count with all that they stand for."
            raise UnreadableError(line, f"the file has more than {MOST_VALUES} values", expected)


def _no_yaml(text: str, error: yaml.YAMLError) -> UnreadableError:
    mark = getattr(error, "problem_mark", None)
    lines = text.splitlines() or [""]
    line = min(mark.line, len(lines) - 1) if mark else 0
    said = " ".join(str(getattr(error, "problem", None) or error).split())[:120]
    found = " ".join(lines[line].split())
    shown = repr(found if len(found) <= 80 else f"{found[:80]}...")
    return UnreadableError(line + 1, f"this is no YAML: {said}, at {shown}", TEXT_REMEDY)
