"""The website's view of the repository: adds the files outside ``docs/`` that pages link to, and mends the links.

On the site, a page of ``docs/`` loses that folder from its address (``docs/use.md`` becomes ``use.md``); every other
file keeps its path in the repository (``deploy/ecs/README.md``, ``benchmarks/results/soak-s3.txt``).
"""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).parent.parent
DOCS = "docs/"
LINK = re.compile(r"(?<=\]\()(?!\w+:)([^)#\s]+)")


def source_of(page: str) -> str:
    """Return where a page of the site is in the repository."""
    return page if (REPOSITORY / page).is_file() else DOCS + page


def page_of(source: str) -> str:
    """Return what a file of the repository is called on the site."""
    return source.removeprefix(DOCS)


def linked(source: str, target: str) -> str | None:
    """Return the file of the repository that a link means; None when there is none, which mkdocs then reports."""
    path = normpath(PurePosixPath(source).parent / target)
    if (REPOSITORY / path).is_dir():
        path += "/README.md"
    return path if (REPOSITORY / path).is_file() else None


def nav_pages(nav: Any) -> Iterator[str]:
    """Yield the pages that a navigation names."""
    if isinstance(nav, str):
        yield nav
    for inner in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from nav_pages(inner)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add each file outside ``docs/`` that is in the navigation or that a page links to."""
    to_read = [source_of(page) for page in nav_pages(config.nav)]
    for source in to_read:
        if not (REPOSITORY / source).is_file():
            continue
        if page_of(source) not in files.src_uris:
            files.append(File.generated(config, page_of(source), abs_src_path=str(REPOSITORY / source)))
        if source.endswith(".md"):
            found = LINK.findall((REPOSITORY / source).read_text())
            to_read += {path for target in found if (path := linked(source, target))} - {*to_read}
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links to where their files are on the site."""
    source = source_of(page.file.src_uri)
    folder = str(PurePosixPath(page.file.src_uri).parent)

    def mended(link: re.Match[str]) -> str:
        path = linked(source, link[1])
        return relpath(page_of(path), folder) if path else link[1]

    return LINK.sub(mended, markdown)
