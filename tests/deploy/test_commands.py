"""Every command in the deployment's pages runs here, or the page gives the reason why it cannot.

A page is one story: its blocks run in order in one shell, against a server of AWS services, in a copy of what the
reader has at hand. A block that cannot run has `<!-- not run: reason -->` on the line before it.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from tests.support.moto_servers import client, moto_server
from tests.support.project import REPOSITORY

PAGES = ("deploy/ecs/README.md", "deploy/k8s/README.md", "docs/deploy.md")
BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^ *```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- not run: (.{10,}) -->$")
NOT_COMMANDS = {"yaml"}


@dataclass(frozen=True)
class Block:
    """A block of commands of a page, and the reason if it cannot run here."""

    text: str
    reason: str | None


def blocks(page: str) -> list[Block]:
    """The commands of a page, in order."""
    text = (REPOSITORY / page).read_text()
    found = []
    for one in BLOCK.finditer(text):
        if one["language"] in NOT_COMMANDS:
            continue
        assert one["language"] == "sh", f"{page}: a block of {one['language']!r}"
        before = text[: one.start()].rstrip("\n").rpartition("\n")[2].strip()
        mark = MARK.match(before)
        lines = [line.removeprefix(one["indent"]) for line in one["text"].splitlines()]
        found.append(Block("\n".join(lines), mark and mark[1]))
    return found


def run_page(page: str, folder: Path, endpoint: str) -> str:
    """Run the commands of a page that can run here, and return their output."""
    shutil.copytree(REPOSITORY / "deploy", folder / "deploy")
    (folder / "checkpoints" / "tf_sapiens").mkdir(parents=True)
    (folder / "checkpoints" / "tf_sapiens" / "config.json").write_text("{}")
    script = "\n".join(["set -euxo pipefail", *[one.text for one in blocks(page) if one.reason is None]])
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HOME": str(folder),
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_PAGER": "",
    }
    done = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_marks_say_something(page: str) -> None:
    text = (REPOSITORY / page).read_text()
    assert text.count("<!-- not run:") == len([one for one in blocks(page) if one.reason is not None])


@pytest.mark.parametrize("page", PAGES)
def test_no_command_hides_in_a_sentence(page: str) -> None:
    text = BLOCK.sub("", (REPOSITORY / page).read_text())
    spoken = re.findall(r"`([^`]+)`", text)
    tools = {"aws", "gcloud", "kubectl", "helm", "docker", "python", "python3", "make", "pip", "dagster"}
    assert not [one for one in spoken if one.split()[0] in tools and len(one.split()) > 1]


def test_an_unmarked_block_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of this test: a command that fails makes a page fail."""
    page = tmp_path / "page.md"
    page.write_text("text\n\n<!-- not run: for some reason -->\n```sh\nfalse\n```\n\n```sh\ntrue\n```\n")
    monkeypatch.setattr("tests.deploy.test_commands.REPOSITORY", tmp_path)
    (tmp_path / "deploy").mkdir()
    (tmp_path / "first").mkdir()
    run_page("page.md", tmp_path / "first", "http://127.0.0.1:9")
    page.write_text("text\n\n```sh\nfalse\n```\n")
    (tmp_path / "second").mkdir()
    with pytest.raises(AssertionError):
        run_page("page.md", tmp_path / "second", "http://127.0.0.1:9")


def test_ecs(tmp_path: Path) -> None:
    assert len(re.findall(r"^\d+\. ", (REPOSITORY / PAGES[0]).read_text(), re.MULTILINE)) == 10
    with moto_server() as endpoint:
        run_page(PAGES[0], tmp_path, endpoint)
        # Taken down: nothing is left.
        assert client(endpoint).list_buckets()["Buckets"] == []


def test_kubernetes(tmp_path: Path) -> None:
    assert len(re.findall(r"^\d+\. ", (REPOSITORY / PAGES[1]).read_text(), re.MULTILINE)) == 10
    with moto_server() as endpoint:
        s3 = client(endpoint)
        s3.create_bucket(Bucket="my-census-tf")
        run_page(PAGES[1], tmp_path, endpoint)
        keys = {one["Key"] for one in s3.list_objects_v2(Bucket="my-census-tf")["Contents"]}
        placement = s3.get_object(Bucket="my-census-tf", Key="sets/placement.yaml")["Body"].read().decode()
    assert {"sets/human_tf_sapiens/defs.yaml", "checkpoints/tf_sapiens/config.json"} <= keys
    assert yaml.safe_load(placement)["kubernetes"]["image"] == "registry.example/team/census-tf-worker:0.1.0"
    objects = (tmp_path / "objects.yaml").read_text()
    assert "MY_" not in objects.partition("\nkind")[2]
    for one in yaml.safe_load_all(objects):
        kubernetes_validate.validate(one, "1.37", strict=True)


def test_the_choice() -> None:
    assert blocks(PAGES[2]) == []


# What a reader may paste into zsh, the shell of macOS, as well as into bash.

NOT_IN_ZSH = {
    "read -p": r"\bread\s(?:[^|;&\n]*\s)?-\w*p",
    "an unquoted pattern of files": r"[\[\]*?]",
    "a list in a variable, which zsh does not split": r"\bfor \w+ in [^;\n]*\$(?![({])|\bfor \w+ in [^;\n]*\$\{",
    "a comment, which an interactive zsh takes for arguments": r"(?:^|\s)#",
    "a letter behind `$NAME:`, which zsh takes for a modifier": r"\$\w+:[A-Za-z&]",
    "a variable that zsh has for itself": r"\b(?:path|status|argv|options|commands)=",
    "history": r"!\w",
}
"""Names and patterns of what differs: zshbuiltins(1) `read -p`, and zshoptions(1) NOMATCH, SH_WORD_SPLIT, BANG_HIST and
INTERACTIVE_COMMENTS; zshexpn(1) "Modifiers"; zshparam(1). The patterns look at commands without their quoted parts."""

IN_QUOTES = re.compile(r"'[^']*'|\"(?:\\.|[^\"\\])*\"")


def not_in_zsh(text: str) -> list[str]:
    """What zsh does in another way than bash in a block of commands."""
    bare = IN_QUOTES.sub("''", text)
    # ${NAME##*/} and $((...)) have the same meaning in both, and `$@` and `$*` are no patterns.
    bare = re.sub(r"\$\{\w+[#%]+[^}]*\}", "''", bare)
    return [name for name, pattern in NOT_IN_ZSH.items() if re.search(pattern, bare, re.MULTILINE)]


@pytest.mark.parametrize("page", PAGES)
def test_commands_mean_the_same_in_zsh(page: str) -> None:
    assert {one.text: found for one in blocks(page) if (found := not_in_zsh(one.text))} == {}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('read -rs -p "password: " PASSWORD', "read -p"),
        ("helm --set a.deployments[0].image=x", "an unquoted pattern of files"),
        ("ls *.yaml", "an unquoted pattern of files"),
        ("for one in $ALL; do echo; done", "a list in a variable, which zsh does not split"),
        ("kubectl label node x a=b    # or c", "a comment, which an interactive zsh takes for arguments"),
        ("docker push x/$NAME:latest", "a letter behind `$NAME:`, which zsh takes for a modifier"),
        ("status=$(x)", "a variable that zsh has for itself"),
    ],
)
def test_what_zsh_does_otherwise_is_found(text: str, wanted: str) -> None:
    assert not_in_zsh(text) == [wanted]


def test_what_both_shells_do_alike_is_not_found() -> None:
    same = (
        'aws --query \'a[0]\' "b[?c].d" s3://$BUCKET/x x-${TASK##*/} x/$TARGET:$VERSION; read -rs WORD; f() { g "$@"; }'
    )
    assert not_in_zsh(same) == []


# Images.

BUILDS = re.compile(r"^.*\b(?:docker|podman)\s+(?:buildx\s+)?build\s+(?=[-$.]).*$|^ *buildah build\s.*$", re.MULTILINE)
"""A command that builds an image. Prose that only names `docker build` is none."""


def image_builds() -> list[tuple[str, str]]:
    """Every command that builds an image in a page, script, comment or Makefile: the file and the command."""
    named = subprocess.check_output(["git", "ls-files", "-z"], cwd=REPOSITORY, text=True).split("\0")
    found = []
    for name in named:
        if name.startswith(("tests/", "benchmarks/results/")) or not name or not (REPOSITORY / name).is_file():
            continue
        if (REPOSITORY / name).suffix in (".md", ".sh", ".yaml", ".py", "") and not (REPOSITORY / name).is_symlink():
            text = (REPOSITORY / name).read_text(errors="replace").replace("\\\n", " ")
            found += [(name, one[0]) for one in BUILDS.finditer(text)]
    return found


def test_images_are_built_for_the_nodes() -> None:
    """A Mac with Apple's chip builds for arm64 by itself, and the nodes are amd64."""
    builds = image_builds()
    assert {name for name, _ in builds} >= {
        "deploy/ecs/README.md",
        "deploy/k8s/README.md",
        "docs/images.md",
        "deploy/images/build.sh",
    }
    assert [one for one in builds if "--platform linux/amd64" not in one[1]] == []
