"""A newcomer at the web interface of the demo starts a backfill by clicking, and then looks at the results.

With CENSUS_TF_SCREENSHOTS set to a folder, what the browser shows on the way is kept there (`make screenshots`). With
--upstream, upstream's own code checks the shards, as in the worker image.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.deployment import REAL, Operator, running_locally
from tests.support.project import RELEASE, REPOSITORY, Project

browsing = pytest.importorskip("tests.support.browser", reason="needs the package selenium")

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not (browsing.CHROMIUM and browsing.DRIVER), reason="needs Debian's chromium, chromium-driver"),
]

LOCATION = "/locations/census_tf_dagster.definitions"
SET = "demo_human"


@dataclass
class Visit:
    page: "browsing.Page"
    operator: Operator
    pictures: Path

    def picture(self, name: str) -> None:
        path = self.pictures / f"{name}.png"
        self.page.picture(path)
        assert 10_000 < path.stat().st_size <= 200_000


@pytest.fixture(scope="module")
def visit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Visit]:
    upstream = request.config.getoption("--upstream")
    folder = tmp_path_factory.mktemp("browser")
    env = {
        "CENSUS_TF_SETS": str(REPOSITORY / "census_tf_dagster" / "defs"),
        "CENSUS_TF_CENSUS": str(folder / "demo-data" / "census" / "{release}"),
        "CENSUS_TF_STORE": str(folder / "demo-data" / "store"),
    }
    if upstream is not None:
        env["PATH"] = os.pathsep.join([str(upstream.absolute().parent), os.environ["PATH"]])
    project = Project(folder, env)
    assert project.command("demo", "--data-only").returncode == 0
    assert project.command("release", "add", RELEASE).returncode == 0
    pictures = Path(os.environ.get("CENSUS_TF_SCREENSHOTS", folder))
    pictures.mkdir(parents=True, exist_ok=True)
    with (
        running_locally(project, daemon=True, module=REAL) as operator,
        browsing.browser(operator.url, folder / "profile") as page,
    ):
        yield Visit(page, operator, pictures.absolute())


def test_a_release_by_clicking(visit: Visit) -> None:
    page = visit.page
    page.open(f"{LOCATION}/asset-groups/{SET}/lineage")
    page.button("Skip")
    for name in (SET, "demo_mouse"):
        page.open(f"{LOCATION}/asset-groups/{name}/lineage")
        page.shows("shard_embeddings")
        page.button("Materialize all")
        page.shows("Partition selection")
        page.click("//button[normalize-space(.)='All']")
        page.wait(lambda: "1 partition" in page.text(), "a chosen partition")
        if name == SET:
            visit.picture("launch")
        page.click("//button[normalize-space(.)='Launch backfill']")
        page.wait(lambda: "Partition selection" not in page.text(), "the dialog to close")
    # Dagster lists a backfill's runs in one row.
    page.open("/runs/")
    page.wait(lambda: page.text().count("Backfill\n") >= 2 and "Started" in page.text(), "two backfills at work")
    page.wait(lambda: _ended(page.text()), "both backfills' end", patience=1800)
    assert "Failure" not in page.text()
    visit.picture("backfills")


def _ended(text: str) -> bool:
    """Tell whether both rows show how they ended, and no row is still running."""
    return len(re.findall(r"^(Success|Completed|Failure|Failed)$", text, re.M)) >= 2 and not re.search(
        r"^(Started|Starting|Queued|In progress|Requested)$", text, re.M
    )


def test_the_pages_of_a_finished_release(visit: Visit) -> None:
    page = visit.page
    page.open(f"{LOCATION}/asset-groups/{SET}/lineage")
    page.wait(lambda: page.text().count("100% filled") >= 4, "four filled assets")
    visit.picture("lineage")
    page.open(f"/assets/{SET}/shard_embeddings?view=partitions&partition={RELEASE}%7C0")
    page.shows("cells_per_second")
    visit.picture("shard")
    page.open(f"/assets/{SET}/embeddings_array?view=partitions&partition={RELEASE}")
    page.shows("published")
    page.button("Show Markdown")
    (shown,) = page.wait(
        lambda: page.driver.find_elements(browsing.By.CSS_SELECTOR, "img[src^='data:image/png']"), "a picture"
    )
    page.wait(lambda: shown.is_displayed() and shown.size["width"] > 500, "the picture to be seen")
    visit.picture("cells")
    page.open(f"/assets/{SET}/embeddings_array?view=checks")
    page.shows("verified")
    assert page.text().count("Succeeded") == 12
    visit.picture("checks")


def test_the_array_that_was_clicked_for(visit: Visit) -> None:
    code = "import sys, tiledbsoma; print(len(tiledbsoma.open(sys.argv[1]).read().tables().concat()))"
    array = visit.operator.project.folder / "demo-data" / "store" / SET / RELEASE
    (found,) = array.glob("*/embeddings")
    command = [sys.executable, "-W", "ignore", "-c", code, str(found)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == str(400 * 64)
