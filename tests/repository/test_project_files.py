"""Files for strangers: license, citation, changelog, public CI and hooks agree with pyproject.toml and the Makefile."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

from tests.support.project import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]


def lint_commands() -> list[str]:
    """Return the commands of `make lint`, as make runs them."""
    makefile = (REPOSITORY / "Makefile").read_text()
    (recipe,) = re.findall(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.M)
    return [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe.splitlines()]


def test_the_license_is_the_one_that_pyproject_names() -> None:
    (path,) = PROJECT["license-files"]
    first, _, copyright_line, *_ = (REPOSITORY / path).read_text().splitlines()
    assert first == f"{PROJECT['license']} License"
    (author,) = PROJECT["authors"]
    assert copyright_line.endswith(author["name"])


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert {one["doi"] for one in citation["references"]} == {"10.1101/2025.04.25.650731", "10.1093/nar/gkae1142"}


def test_the_changelog_has_this_version() -> None:
    versions = re.findall(r"^## (\S+) - ", (REPOSITORY / "CHANGELOG.md").read_text(), re.M)
    assert PROJECT["version"] in versions


def test_the_public_ci_runs_our_script_on_the_pythons_that_we_promise() -> None:
    workflow = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "ci.yml").read_text())
    assert workflow["permissions"] == {"contents": "read"}
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert all(re.search(r"@v\d+$", step["uses"]) for step in job["steps"] if "uses" in step)
    pythons = job["strategy"]["matrix"]["python"]
    classified = [one.rpartition(" ")[2] for one in PROJECT["classifiers"] if re.search(r"Python :: \d\.\d+$", one)]
    lowest, above = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", PROJECT["requires-python"]).groups()  # type: ignore[union-attr]
    assert pythons == classified == [f"3.{minor}" for minor in range(int(lowest), int(above))]


def test_pre_commit_runs_what_make_lint_runs() -> None:
    (repository,) = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for hook in repository["hooks"]] == lint_commands()
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}


@pytest.mark.parametrize("form", ["bug", "feature"])
def test_issue_forms_have_what_forges_require(form: str) -> None:
    read = yaml.safe_load((REPOSITORY / ".github" / "ISSUE_TEMPLATE" / f"{form}.yml").read_text())
    assert {"name", "description", "body"} <= read.keys()
    fields = [one for one in read["body"] if one["type"] != "markdown"]
    assert len({one["id"] for one in fields}) == len(fields)
    assert all(one["attributes"]["label"] for one in fields)


def test_the_wheel_says_that_it_is_typed_and_carries_the_license(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=REPOSITORY, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = ZipFile(wheel).namelist()
    assert "census_tf_dagster/py.typed" in names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
