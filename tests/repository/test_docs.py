"""README and docs: commands are run or say why not, links lead somewhere, and the page of fields is the schema's."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from census_tf_dagster.config_reference import configure_page
from tests.support.fork_server import OURS
from tests.support.project import REPOSITORY

pytestmark = pytest.mark.takes(150)

TOP = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
PAGES = [*TOP, *sorted((REPOSITORY / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>[^\n]+?) -->\n)?^ *```(?P<kind>\S*)\n(?P<code>.*?)^ *```$", re.M | re.S
)

PYTHON_RUN_BY = {
    "README.md": "below",
    "read.md": "tests/demo/test_demo.py",
    "embed.md": "tests/demo/test_demo.py",
    "use.md": "below",
    "publish.md": "tests/store/test_rules.py",
}

FORK = """
import os, sys
from pathlib import Path
from tests.support.fork_server import ForkedProcess

sys.exit(ForkedProcess("dagster", sys.argv[1:], Path.cwd(), os.environ).wait())
"""


@dataclass(frozen=True)
class Block:
    page: Path
    kind: str
    code: str
    reason: str | None


def blocks() -> list[Block]:
    return [
        Block(page, found["kind"], found["code"], found["reason"])
        for page in PAGES
        for found in BLOCK.finditer(page.read_text())
    ]


def test_every_block_says_what_it_is() -> None:
    kinds = {(block.page.name, block.kind) for block in blocks()}
    known = ("bash", "python", "yaml", "text", "json")
    assert [one for one in kinds if one[1] not in known] == []
    # An opened block that the pattern did not see would escape the test below.
    for page in PAGES:
        fences = re.findall(r"^ *```", page.read_text(), re.M)
        assert len(fences) == 2 * sum(block.page == page for block in blocks()), page


@pytest.fixture(scope="module")
def demo_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    (folder / "census_tf_dagster").symlink_to(REPOSITORY / "census_tf_dagster")
    (folder / "pyproject.toml").symlink_to(REPOSITORY / "pyproject.toml")
    run(folder, "mkdir -p demo-data/dagster_home; python -m census_tf_dagster demo --data-only")
    return folder


@pytest.fixture(scope="module")
def forked_dagster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a command `dagster` that is forked, because importing what it needs takes seconds."""
    command = tmp_path_factory.mktemp("bin") / "dagster"
    command.write_text(f"#!{sys.executable}\n{FORK}")
    command.chmod(0o755)
    # If the command started the server, the server would keep the command's output open.
    OURS.pid()
    return command.parent


def run(folder: Path, code: str, *commands: Path) -> str:
    path = ":".join(map(str, (*commands, Path(sys.executable).parent, os.environ["PATH"])))
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(REPOSITORY), "PYTHONWARNINGS": "ignore"}
    command = ["bash", "-euo", "pipefail", "-c", code]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{code}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_shell_blocks_run(demo_data: Path, forked_dagster: Path) -> None:
    shell = [block for block in blocks() if block.kind == "bash"]
    assert any(block.reason is None for block in shell)
    for block in shell:
        if block.reason is None:
            run(demo_data, block.code, forked_dagster)
    array = next((demo_data / "demo-data" / "store" / "demo_mouse").glob("*/*/embeddings"))
    for page in ("README.md", "use.md"):
        (python,) = [block.code for block in blocks() if block.page.name == page and block.kind == "python"]
        program = demo_data / f"{page}.py"
        program.write_text(python.replace("<array path from the report>", str(array)))
        run(demo_data, f"python {program}")


def test_python_blocks_are_run_somewhere() -> None:
    for block in blocks():
        if block.kind == "python" and block.reason is None:
            assert block.page.name in PYTHON_RUN_BY, block.page


def test_relative_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if not re.match(r"https?:", target):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_named_results_exist() -> None:
    for page in PAGES:
        for name in re.findall(
            r"`(?:benchmarks/results/)?([a-z0-9-]+-cpu\.txt|soak[a-z0-9-]*\.txt|fragments\.txt)`", page.read_text()
        ):
            assert (REPOSITORY / "benchmarks" / "results" / name).exists(), f"{page.name}: {name}"


def test_figures_of_the_readme_are_in_their_files() -> None:
    rows = re.findall(r"^\| [^|]+ \| ([\d.,]+) \| ([\d.,]+) \|[^|]+\| `(\S+)` \|$", PAGES[0].read_text(), re.M)
    assert len(rows) >= 5
    for ours, theirs, name in rows:
        results = (REPOSITORY / "benchmarks" / "results" / name).read_text().replace(",", "")
        for figure in (ours, theirs):
            assert re.search(rf"(?<![\d.]){re.escape(figure.replace(',', ''))}(?![\d])", results), (figure, name)


def test_the_page_of_fields_is_the_schemas() -> None:
    assert (REPOSITORY / "docs" / "configure.md").read_text() == configure_page(), "run `make docs`"


def test_the_website_builds(tmp_path: Path) -> None:
    """A warning is an error: a broken link, a page that the navigation lacks or invents."""
    build = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    built = {path.relative_to(tmp_path / "site").as_posix() for path in (tmp_path / "site").rglob("*.html")}
    pages = {"index.html", *(f"{page.stem}.html" for page in (REPOSITORY / "docs").glob("*.md"))}
    assert pages <= built
    home = (tmp_path / "site" / "index.html").read_text()
    assert {page for page in pages if f'href="{page}"' not in home} == set()
    fetched = re.findall(r'(?:<link[^>]+href|<(?:script|img)[^>]+src)="?(https?:[^" >]+)', home)
    assert fetched == [], "the site fetches nothing from elsewhere"


def test_readme_is_of_one_screen() -> None:
    assert len(PAGES[0].read_text().splitlines()) <= 80


def test_no_benchmark_hides_a_module_of_python() -> None:
    """Upstream's python runs scripts of that folder, and so finds what stands beside them first."""
    names = {path.stem for path in (REPOSITORY / "benchmarks").glob("*.py")}
    assert not names & sys.stdlib_module_names
