"""The help of every command: it has an example that parses, a meaning, and --json where a script would read it."""

import argparse
import json
import shlex
from collections.abc import Iterator

import pytest

from census_tf_dagster.cli import build_parser, main
from tests.support.project import RELEASE, Project

PROGRAM = "census-tf-dagster "
FOR_PEOPLE = {"demo": "`inspect --json` reports its arrays"}


def leaves(parser: argparse.ArgumentParser, path: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    children = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    for action in children:
        for name, child in action.choices.items():
            yield from leaves(child, f"{path} {name}".strip())
    if not children:
        yield path, parser


LEAVES = dict(leaves(build_parser()))


@pytest.mark.parametrize("name", LEAVES)
def test_each_command_has_an_example_that_parses(name: str) -> None:
    epilog = LEAVES[name].epilog or ""
    assert epilog.startswith(f"example: {PROGRAM}{name}"), epilog
    example = epilog.removeprefix(f"example: {PROGRAM}").splitlines()[0]
    assert build_parser().parse_args(shlex.split(example)).run


@pytest.mark.parametrize("name", [name for name in LEAVES if name not in FOR_PEOPLE])
def test_each_command_has_json(name: str) -> None:
    assert "--json" in LEAVES[name].format_help()


def test_help_lists_every_command_once_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for name in {path.split()[0] for path in LEAVES}:
        (line,) = [one for one in lines if one.startswith(f"  {name} ")]
        assert len(line.split()) > 4


def test_wrong_arguments_are_exit_code_2() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["launch"])
    assert caught.value.code == 2


def test_releases_in_json(project: Project) -> None:
    project.census.mkdir(parents=True)
    answers = [
        project.command("release", *words, "--json") for words in (("add", RELEASE), ("add", RELEASE), ("list",))
    ]
    first, again, listed = (json.loads(answer.stdout) for answer in answers)
    assert first == {"release": RELEASE, "added": True, "census": str(project.census)}
    assert not again["added"]
    assert listed == {"releases": [RELEASE]}


def test_json_of_a_launch_that_is_followed_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "tiny", RELEASE, "--json"]) == 1
    assert "status --json" in capsys.readouterr().err
