"""The images: the content of the Dockerfile, and (soak) the content of the built images."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from census_tf_dagster.demo.checkpoint import build_checkpoint
from census_tf_dagster.demo.synthetic import KNOWN_ASSAYS
from census_tf_dagster.inference.checkpoint import read_checkpoint
from tests.support.project import REPOSITORY

IMAGES = REPOSITORY / "deploy" / "images"
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()
SCRIPTS = [IMAGES / name for name in ("build.sh", "entrypoint", "healthcheck")]
TARGETS = ("control", "worker")
ASSETS = ("approval", "embeddings_array", "obs_id_plan", "shard_embeddings")
CANARY = "canary-5b1f0c9e7d"
"""A value in the builder's environment in the place of secrets."""


def instructions(text: str = DOCKERFILE) -> list[tuple[str, str]]:
    """Return (instruction, arguments), continued lines joined."""
    lines = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [(word, rest.strip()) for line in lines if line.strip() for word, _, rest in [line.partition(" ")]]


def stages() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for word, rest in instructions():
        if word == "FROM":
            found[rest.split()[-1]] = []
        elif found:
            list(found.values())[-1].append((word, rest))
    return found


def copied() -> list[str]:
    """Return what is copied from the checkout, build arguments resolved to their defaults."""
    defaults = dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG")
    copies = [rest.split() for word, rest in instructions() if word in ("COPY", "ADD") and "--from=" not in rest]
    return [re.sub(r"\$\{(\w+)\}", lambda m: defaults[m[1]], source) for words in copies for source in words[:-1]]


def tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def test_the_linters_find_nothing() -> None:
    for command in ([tool("hadolint"), "Dockerfile"], [tool("shellcheck"), *map(str, SCRIPTS)]):
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("target", TARGETS)
def test_images_end_as_a_numbered_user(target: str) -> None:
    # Kubernetes' runAsNonRoot takes no name.
    words = stages()[target]
    users = [rest for word, rest in words if word == "USER"]
    assert users == ["1000:1000"]
    after = [word for word, _ in words[[word for word, _ in words].index("USER") :]]
    assert not {"RUN", "COPY", "ADD"} & set(after)
    assert [word for word, _ in words].count("HEALTHCHECK") == 1


def test_pip_takes_what_the_constraints_say() -> None:
    installs = [part for word, rest in instructions() if word == "RUN" for part in rest.split("&&") if "pip " in part]
    assert len(installs) == 7
    for install in installs:
        assert "/constraints.txt" in install or "--no-deps" in install, install


def test_everything_that_is_installed_is_pinned() -> None:
    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", re.split(r"[ <>=!~\[;]", name)[0]).lower()

    assert all(
        "==" in line for line in (REPOSITORY / "deploy" / "upstream.txt").read_text().splitlines() if line[:1] != "#"
    )
    pins = {normal(line) for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if line[:1] != "#"}
    asked = re.findall(r"requirements\.py ([a-z ]+) >", DOCKERFILE)
    assert [names.split() for names in asked] == [["base", "ui", "deploy"], ["worker"]]
    for names in asked:
        listed = subprocess.check_output(
            [sys.executable, IMAGES / "requirements.py", *names.split()], cwd=REPOSITORY, text=True
        ).split()
        assert listed
        assert {normal(name) for name in listed} <= pins
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert "torch>=2.5" in project["optional-dependencies"]["worker"]
    assert not any("torch" in name for name in project["dependencies"])


def test_only_what_is_copied_gets_into_a_build() -> None:
    first, *allowed = [
        line for line in (REPOSITORY / ".dockerignore").read_text().splitlines() if line and line[0] != "#"
    ]
    assert first == "*"
    folders = {line[1:] for line in allowed if line.startswith("!")}
    assert not [line for line in allowed if line[0] != "!" and not line.startswith("**/")]
    assert not {".git", ".venv", "demo-data", ".", "shared", "tests"} & folders
    sources = copied()
    assert "census_tf_dagster" in sources
    for source in sources:
        assert (REPOSITORY / source).exists(), source
        assert any(source == folder or source.startswith(f"{folder}/") for folder in folders), source


def test_code_comes_after_packages() -> None:
    for name in ("python", "control-packages", "worker-packages"):
        sources = [rest for word, rest in stages()[name] if word == "COPY"]
        assert not [
            source for source in sources if not re.search(r"constraints\.txt|upstream\.txt|--from=requirements", source)
        ]


def test_no_secret_is_a_part_of_the_recipe() -> None:
    for word, rest in instructions():
        if word in ("ENV", "ARG"):
            assert not re.search("PASSWORD|TOKEN|SECRET|ACCESS_KEY|INDEX_URL", rest), rest
        assert "://" not in rest, rest
    for install in (rest for word, rest in instructions() if word == "RUN" and "pip install -c" in rest):
        assert install.startswith("--mount=type=secret,id=pip.conf,")


@pytest.fixture
def entrypoint(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    shutil.copy(IMAGES / "entrypoint", tmp_path)
    (tmp_path / "ecs").mkdir()
    shutil.copy(REPOSITORY / "deploy" / "ecs" / "dagster.yaml", tmp_path / "ecs")
    (tmp_path / "home").mkdir()

    def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [tmp_path / "entrypoint", *command],
            env={**os.environ, "DAGSTER_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path), **env},
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_the_entrypoint_gives_the_instance_of_the_platform(
    entrypoint: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = entrypoint("printf", "%s|", "a b", "c", CENSUS_TF_PLATFORM="ecs")
    assert (done.returncode, done.stdout) == (0, "a b|c|")
    given = tmp_path / "home" / "dagster.yaml"
    assert given.read_text() == (REPOSITORY / "deploy" / "ecs" / "dagster.yaml").read_text()
    given.write_text("mounted: true\n")
    assert entrypoint("sh", "-c", "exit 7", CENSUS_TF_PLATFORM="ecs").returncode == 7
    assert given.read_text() == "mounted: true\n"


def test_a_platform_that_is_none(entrypoint: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    done = entrypoint("echo", "started", CENSUS_TF_PLATFORM="nomad")
    assert (done.returncode, done.stdout) == (2, "")
    assert "CENSUS_TF_PLATFORM is 'nomad'; expected ecs, or a dagster.yaml mounted" in done.stderr
    assert entrypoint("echo", "started").stdout == "started\n"
    assert not list((tmp_path / "home").iterdir())


def test_the_settings_of_pip_go_along(tmp_path: Path) -> None:
    for folder in ("wheels", "index/simple", "out"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "ca.pem").write_text("certificate")
    env = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    mounts = subprocess.check_output(
        [sys.executable, IMAGES / "pip_settings.py", tmp_path / "out"],
        env={
            **env,
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_INDEX_URL": "https://user:word@registry.example/simple",
            "PIP_EXTRA_INDEX_URL": f"file://{tmp_path}/index/simple",
            "PIP_FIND_LINKS": f"{tmp_path}/wheels",
            "PIP_CERT": f"{tmp_path}/ca.pem",
            "PIP_REQUIRE_VIRTUALENV": "1",
        },
        text=True,
    ).split()
    assert (tmp_path / "out" / "cert.pem").read_text() == "certificate"
    written = (tmp_path / "out" / "pip.conf").read_text().splitlines()
    assert written[0] == "[global]"
    settings = dict(line.split(" = ") for line in written[1:])
    inside = {mount.removeprefix("--volume=").split(":")[0]: mount.split(":")[1] for mount in mounts}
    assert settings == {
        "index-url": "https://user:word@registry.example/simple",
        "extra-index-url": f"file://{inside[f'{tmp_path}/index']}/simple",
        "find-links": inside[f"{tmp_path}/wheels"],
        "cert": "/mnt/cert.pem",
    }
    assert set(inside) == {f"{tmp_path}/{name}" for name in ("out", "index", "wheels")}
    assert all(path == "/mnt" or path.startswith("/mnt/") for path in inside.values())


# What is in the images: minutes to build where they are not, so out of the default run.


@pytest.fixture(scope="module")
def built() -> None:
    """Build both images on a base of Debian's packages. Existing layers are used."""
    missing = [name for name in ("buildah", "debootstrap", "unshare", "ip") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"takes root and {', '.join(missing) or 'no more'}")
    planted = dict.fromkeys(("AWS_SECRET_ACCESS_KEY", "DAGSTER_PG_PASSWORD"), CANARY)
    subprocess.run([IMAGES / "build.sh"], env={**os.environ, **planted, "BASE": "debootstrap"}, check=True)


@contextmanager
def container(target: str, tag: str = "latest") -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """Make a container, in which commands run as its entrypoint runs them, with no network but a loopback."""
    name = subprocess.check_output(["buildah", "from", f"localhost/census-tf-{target}:{tag}"], text=True).strip()

    def run(*command: str, volumes: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
        options = [f"--volume={volume}" for volume in volumes]
        options += [f"--env={key}={value}" for key, value in env.items()]
        inside = ["buildah", "run", "--isolation", "chroot", *options, name, "--", "/opt/dagster/entrypoint", *command]
        return subprocess.run(
            ["unshare", "--net", "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *inside],
            capture_output=True,
            text=True,
            check=False,
        )

    try:
        yield run
    finally:
        subprocess.run(["buildah", "rm", name], check=True, capture_output=True)


@pytest.mark.soak
@pytest.mark.parametrize("target", TARGETS)
def test_definitions_load_as_a_user_who_is_not_root(built: None, target: str) -> None:
    code = """
import importlib.util, os, pathlib, sys
from census_tf_dagster.definitions import defs
keys = sorted(key.to_user_string() for key in defs().resolve_all_asset_keys())
print(os.getuid(), os.getcwd(), importlib.util.find_spec("torch") is not None, len(keys), keys[0])
print([str(path) for path in (pathlib.Path(sys.prefix), pathlib.Path("/opt/dagster")) if os.access(path, os.W_OK)])
print([name for name in ("DAGSTER_HOME", "CENSUS_TF_CACHE") if not os.access(os.environ[name], os.W_OK)])
"""
    with container(target) as run:
        done = run("python", "-c", code)
    torch = target == "worker"
    expected = [f"1000 /opt/dagster {torch} 12 demo_human/approval", "[]", "[]"]
    assert done.stdout.splitlines() == expected, done.stderr


@pytest.mark.soak
def test_a_changed_set_takes_no_new_image(built: None, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    yaml = (REPOSITORY / "census_tf_dagster/defs/demo_human/defs.yaml").read_text().replace("demo_human", "mine")
    (tmp_path / "mine" / "defs.yaml").write_text(yaml)
    for path in (tmp_path, tmp_path / "mine"):
        path.chmod(0o755)
    with container("control") as run:
        volume = f"{tmp_path}:/sets:ro"
        done = run("dg", "--version", volumes=(volume,))
        assert done.returncode == 0, done.stderr
        command = ("dagster", "asset", "list", "-m", "census_tf_dagster.definitions")
        done = run(*command, volumes=(volume,), CENSUS_TF_SETS="/sets")
    assert done.stdout.split() == [f"mine/{asset}" for asset in ASSETS], done.stderr


@pytest.mark.soak
def test_sets_and_a_checkpoint_are_baked_by_choice(built: None, tmp_path: Path) -> None:
    """A checkout with a set and a checkpoint of its own: the images hold them, and the checkpoint is the same."""
    checkout = tmp_path / "checkout"
    for name in subprocess.check_output(["git", "ls-files"], cwd=REPOSITORY, text=True).splitlines():
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(REPOSITORY / name, checkout / name)
    yaml = (REPOSITORY / "census_tf_dagster/defs/demo_human/defs.yaml").read_text().replace("demo_human", "mine")
    (checkout / "deploy/sets/mine").mkdir(parents=True)
    (checkout / "deploy/sets/mine/defs.yaml").write_text(yaml)
    folder = checkout / "deploy/images/checkpoints/tf_mine"
    build_checkpoint(folder, ["ENSG1", "ENSG2"], KNOWN_ASSAYS, embed_dim=16, seq_len=7, block_len=8)
    build = [checkout / "deploy/images/build.sh", "baked", "--build-arg=SETS=deploy/sets"]
    subprocess.run(build, env={**os.environ, "BASE": "debootstrap"}, check=True)
    code = """
from pathlib import Path
from census_tf_dagster.inference.checkpoint import read_checkpoint
print(read_checkpoint(Path("/opt/census_tf/checkpoints/tf_mine")).fingerprint)
"""
    with container("worker", "baked") as run:
        baked = run("python", "-W", "ignore", "-c", code)
        command = ("dagster", "asset", "list", "-m", "census_tf_dagster.definitions")
        listed = run(*command, CENSUS_TF_CHECKPOINTS="/opt/census_tf/checkpoints")
    assert baked.stdout.strip() == read_checkpoint(folder).fingerprint, baked.stderr
    found = listed.stdout.split()
    assert [key for key in found if key.startswith("mine/")] == [f"mine/{asset}" for asset in ASSETS], listed.stderr
    assert "human_tf_sapiens/obs_id_plan" in found


@pytest.mark.soak
@pytest.mark.parametrize(
    "command",
    [
        "dagster-webserver -h 0.0.0.0 -p 3000 -m census_tf_dagster.definitions",
        "dagster api grpc -h 0.0.0.0 -p 4000 -m census_tf_dagster.definitions",
        "dagster code-server start -h 0.0.0.0 -p 4000 -m census_tf_dagster.definitions",
        "dagster-daemon run -m census_tf_dagster.definitions",
    ],
)
def test_the_health_check_tells(built: None, command: str) -> None:
    script = f"""
echo {command} > /tmp/census-tf-command
/opt/dagster/healthcheck > /dev/null 2>&1 && echo healthy before it started
rm /tmp/census-tf-command
/opt/dagster/entrypoint {command} > /tmp/log 2>&1 &
server=$!
tries=0
until /opt/dagster/healthcheck > /tmp/last 2>&1; do
    tries=$((tries + 1))
    [ $tries -lt 60 ] || {{ echo never; cat /tmp/last /tmp/log; break; }}
    sleep 1
done
/opt/dagster/healthcheck > /dev/null && echo healthy
kill -9 $server; wait $server 2> /dev/null
case "{command}" in *daemon*) ;; *) /opt/dagster/healthcheck > /dev/null 2>&1 && echo healthy after its end ;; esac
echo end
"""
    with container("control") as run:
        done = run("sh", "-c", script)
    assert done.stdout.splitlines() == ["healthy", "end"], done.stdout + done.stderr


@pytest.mark.soak
def test_the_database_migrates_from_the_control_image(built: None) -> None:
    def python(code: str) -> str:
        return f'python -c "import dagster as dg; i = dg.DagsterInstance.get(); {code}"'

    add, show = "i.add_dynamic_partitions('r', ['r1'])", "print(i.get_dynamic_partitions('r'))"
    migrate = "dagster instance migrate > /dev/null"
    with container("control") as run:
        done = run("sh", "-c", f"{python(add)} && {migrate} && {migrate} && {python(show)}")
    assert done.stdout.split() == ["['r1']"], done.stdout + done.stderr


@pytest.mark.soak
def test_the_whole_demo_inside_the_worker(built: None) -> None:
    with container("worker") as run:
        done = run("sh", "-c", "id -u && cd && python -m census_tf_dagster demo && ls -ld demo-data/store")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "1000"
    assert "Every planned cell is in its array exactly once" in done.stdout
    assert {line.split()[0] for line in lines if "/embeddings" in line} >= {"demo_human", "demo_marmoset", "demo_mouse"}
    assert lines[-1].split()[2] == "dagster"


@pytest.mark.soak
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_of_the_builder_is_in_an_image(built: None, target: str, tmp_path: Path) -> None:
    subprocess.check_output([sys.executable, IMAGES / "pip_settings.py", tmp_path])
    words = set((tmp_path / "pip.conf").read_text().split())
    secret = {word for word in words if "/" in word and word != "/mnt"} | {"[global]"}
    image = f"localhost/census-tf-{target}:latest"
    told = subprocess.check_output(["buildah", "inspect", "--type", "image", image], text=True)
    assert "CENSUS_TF_CACHE" in told
    config = json.loads(told)["Docker"]["config"]
    assert config["User"] == "1000:1000"
    assert not [word for word in secret | {CANARY} if word in told]
    name = subprocess.check_output(["buildah", "from", image], text=True).strip()
    root = Path(subprocess.check_output(["buildah", "mount", name], text=True).strip())
    try:
        for place in ("mnt", "root", "home/dagster", "tmp"):
            kept = [path for path in (root / place).rglob("*") if path.is_file()]
            assert {path.name for path in kept} <= {".bashrc", ".profile", ".bash_logout"}
        assert not [p for p in ("etc/pip.conf", "etc/xdg/pip", "root/.config", "root/.netrc") if (root / p).exists()]
        mark = "expected ecs, or a dagster.yaml mounted in"
        patterns = tmp_path / "patterns"
        patterns.write_text("\n".join([mark, *(secret - {"[global]"}), CANARY]))
        found = subprocess.run(
            ["grep", "--recursive", "--files-with-matches", "--fixed-strings", f"--file={patterns}", root / "opt"]
            + [root / place for place in ("etc", "home", "root", "var", "usr/local")],
            capture_output=True,
            text=True,
            check=False,
        )
        assert found.stdout.split() == [str(root / "opt/dagster/entrypoint")]
    finally:
        subprocess.run(["buildah", "rm", name], check=True, capture_output=True)
