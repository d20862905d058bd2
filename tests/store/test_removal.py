"""A removal never happens under a worker, and the same command finishes an interrupted one."""

import json
import os
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from census_tf_dagster.errors import UserError
from census_tf_dagster.io.s3 import S3Settings
from census_tf_dagster.io.storage import Storage
from census_tf_dagster.pipeline.embed_shard import embed_shard
from census_tf_dagster.pipeline.finish_array import finish_array
from census_tf_dagster.pipeline.plan_release import make_plan
from census_tf_dagster.store.inventory import inspect_store, remove_release
from census_tf_dagster.store.removal import (
    delete_marked,
    mark_for_removal,
    noticing_removal,
    removal_word,
    require_quiet,
)
from tests.support.builders import age, fill, tiny
from tests.support.moto_servers import client
from tests.support.project import RELEASE, Project

pytestmark = pytest.mark.takes(100)

DAY = 86400


@pytest.fixture
def root(project: Project) -> Path:
    """Return the folder of an array that was finished an hour ago."""
    tiny(project, cells=40, shards=2)
    with project.context("tiny") as context:
        fill(context)
        finish_array(context)
    age(project.folder / "store")
    return project.array("tiny").parent


def remove(root: Path) -> str:
    """Remove a folder as the command does."""
    store, (name, release, identity) = str(root.parents[2]), root.parts[-3:]
    return remove_release(store, Storage(), name, release, identity, identity)


def cut_short(root: Path, seed: int) -> None:
    """Delete some of the files, like a killed removal."""
    rng = random.Random(seed)
    files = [path for path in sorted(root.rglob("*")) if path.is_file() and path.parent.name != "removal"]
    for path in rng.sample(files, rng.randrange(1, len(files))):
        path.unlink()
        if rng.random() < 0.5 and not any(path.parent.iterdir()):
            path.parent.rmdir()


def test_what_is_being_written_is_not_removed(project: Project, root: Path) -> None:
    with project.context("tiny") as context:
        embed_shard(context, 0, recompute=True)
    before = sorted(root.rglob("*"))
    done = project.command("remove", "tiny", RELEASE, root.name, "--confirm", root.name)
    assert done.returncode == 1
    assert "so a worker may be using it; expected 15 min without a write. Nothing was removed." in done.stderr
    assert sorted(root.rglob("*")) == before
    age(root)
    done = project.command("remove", "tiny", RELEASE, root.name, "--confirm", root.name)
    assert (done.returncode, done.stderr) == (0, "")
    assert not root.exists()


@pytest.mark.parametrize("seed", range(8))
def test_a_removal_that_was_cut_short_is_finished_by_the_same_command(project: Project, root: Path, seed: int) -> None:
    mark_for_removal(Storage(), str(root))
    cut_short(root, seed)
    (holding,) = inspect_store(str(root.parents[2]), Storage())
    assert (holding.state, holding.identity) == ("removing", root.name)
    unfinished = r"was started but not finished.*Finish it: "
    with project.context("tiny") as context, pytest.raises(UserError, match=unfinished) as told:
        make_plan(context)
    assert f"remove tiny {RELEASE} {root.name} --confirm {root.name}" in str(told.value)
    assert str(told.value).split("Finish it: ")[1] in holding.problem
    remove(root)
    assert not root.exists()
    with project.context("tiny") as context:
        make_plan(context)


@pytest.mark.parametrize("seed", range(8))
def test_any_rest_is_shown_and_removed(root: Path, seed: int) -> None:
    cut_short(root, seed)
    (holding,) = inspect_store(str(root.parents[2]), Storage())
    assert "\n" not in holding.problem
    assert "(damaged)" in remove(root) or not holding.problem
    assert not root.exists()


def test_a_rest_that_is_written_to_again_is_left_alone(root: Path) -> None:
    mark_for_removal(Storage(), str(root))
    require_quiet(Storage(), str(root))
    late = root / "embeddings" / "late"
    late.write_text("a commit")
    os.utime(late, (time.time() + 60,) * 2)
    with pytest.raises(UserError, match="was written to 0 s ago"):
        remove(root)
    assert removal_word(Storage(), str(root)) == ""
    age(root)
    remove(root)
    assert not root.exists()


def test_a_worker_is_told_that_its_folder_was_removed(project: Project) -> None:
    tiny(project, shards=1)
    with project.context("tiny") as context:
        make_plan(context)
        root = Path(context.folder.root)

        def remove_under_it(_: object) -> None:
            if root.exists():
                mark_for_removal(context.store, context.folder.root)
                delete_marked(context.store, context.folder.root)

        message = "was removed .* while this run used it; .* committed embeddings are gone"
        with pytest.raises(UserError, match=message), noticing_removal(context.store, context.folder):
            embed_shard(context, 0, report=remove_under_it)


def test_other_failures_stay_what_they_are(project: Project) -> None:
    tiny(project, shards=1)
    with project.context("tiny") as context:
        with pytest.raises(UserError, match="there is no plan"), noticing_removal(context.store, context.folder):
            embed_shard(context, 0)
        make_plan(context)
        with pytest.raises(ZeroDivisionError), noticing_removal(context.store, context.folder):
            print(1 / 0)


def test_pruning_that_was_cut_short_is_finished_by_the_same_command(project: Project, root: Path) -> None:
    store = root.parents[2]
    for release in ("2023-05-15", "2024-07-01", "2025-01-30"):
        shutil.copytree(root.parent, store / "tiny" / release)
    age(store, 100 * DAY)
    (project.folder / "sets" / "retention.yaml").write_text("policy: expire\nreleases: 1\n")
    word = project.command("prune").stdout.split("--confirm ")[1].strip()
    first, second, third = (str(store / "tiny" / one / root.name) for one in ("2023-05-15", "2024-07-01", "2025-01-30"))
    for one in (first, second, third):
        mark_for_removal(Storage(), one, word)
    delete_marked(Storage(), first)
    cut_short(Path(second), seed=1)
    shown = project.command("prune")
    assert "2 arrays" in shown.stdout
    assert "removing" in shown.stdout
    wrong = project.command("prune", "--confirm", "0123456789ab")
    assert "Nothing was done. Run" in wrong.stderr
    done = project.command("prune", "--confirm", word, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert [one.release for one in inspect_store(str(store), Storage())] == [RELEASE]
    assert json.loads(done.stdout)["done"] is True


def test_thousands_of_objects_on_s3(s3: str) -> None:
    bucket = client(s3)
    bucket.create_bucket(Bucket="store")
    root = "tiny/2025-11-08/0123456789ab"
    keys = [f"{root}/embeddings/__fragments/{number}/a0.tdb" for number in range(1100)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda key: bucket.put_object(Bucket="store", Key=key, Body=b"x"), [*keys, "tiny/kept"]))
    storage = Storage(S3Settings("us-east-1", s3))
    with pytest.raises(UserError, match="was written to"):
        remove_release("s3://store", storage, *root.split("/"), root[-12:])
    mark_for_removal(storage, f"s3://store/{root}")
    (holding,) = inspect_store("s3://store", storage)
    assert (holding.state, holding.bytes > 1100) == ("removing", True)
    remove_release("s3://store", storage, *root.split("/"), root[-12:])
    left = bucket.list_objects_v2(Bucket="store")["Contents"]
    assert [one["Key"] for one in left] == ["tiny/kept"]
