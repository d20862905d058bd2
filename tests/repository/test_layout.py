"""The rooms of the repository. Which room may import which is checked by `make lint` (pyproject.toml, importlinter)."""

import ast

from tests.support.project import REPOSITORY

PACKAGE = REPOSITORY / "census_tf_dagster"
TESTS = REPOSITORY / "tests"


def test_few_modules_stand_outside_the_rooms() -> None:
    loose = sorted(path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__"))
    assert len(loose) <= 8, loose


def test_every_room_says_what_it_is_for() -> None:
    for path in PACKAGE.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_tests_are_in_the_rooms_of_what_they_test() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and not path.name.startswith("__")}
    outside = {"support", "deploy", "repository"}
    assert {path.name for path in TESTS.iterdir() if (path / "__init__.py").exists()} <= rooms | outside | {"cli"}
    assert not list(TESTS.glob("test_*.py"))


def test_no_test_module_imports_another() -> None:
    for path in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.startswith("tests.") and ".test_" in name], path
