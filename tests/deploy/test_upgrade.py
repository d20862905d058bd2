"""A deployment changes its version in the middle of a release: the arrays behave as docs/upgrade.md says."""

import re
import shutil

import pytest

from census_tf_dagster.errors import UserError
from census_tf_dagster.identity import NUMERIC_VERSION, Identity
from census_tf_dagster.inference import checkpoint_cache as prepare
from census_tf_dagster.pipeline.embed_shard import embed_shard
from census_tf_dagster.pipeline.finish_array import finish_array
from census_tf_dagster.pipeline.plan_release import make_plan
from tests.support.builders import tiny
from tests.support.project import REPOSITORY, Project

SHARDS = 2
PAGE = (REPOSITORY / "docs" / "upgrade.md").read_text()


def move_to(numeric_version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, let the code have another numeric version."""
    *others, default = Identity.__init__.__defaults__ or ()
    assert isinstance(default, int)
    monkeypatch.setattr(Identity.__init__, "__defaults__", (*others, numeric_version))


def files_of(project: Project) -> dict[str, bytes]:
    store = project.folder / "store"
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def test_the_same_numeric_version_goes_on_where_the_release_is(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is computed again, even if the next version prepares checkpoints in another form."""
    tiny(project, shards=SHARDS)
    with project.context("tiny") as context:
        make_plan(context)
        embed_shard(context, 0)
    monkeypatch.setattr(prepare, "FORMAT", prepare.FORMAT + 1)
    shutil.rmtree(project.folder / "cache")
    with project.context("tiny") as context:
        computed = [embed_shard(context, shard).megabatches_computed for shard in range(SHARDS)]
        assert computed[0] == 0
        assert computed[1] > 0
        assert finish_array(context).totals.cells == 200


def test_another_numeric_version_begins_anew_beside_the_old_array(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny(project, shards=SHARDS)
    with project.context("tiny") as context:
        make_plan(context)
        embed_shard(context, 0)
        old = context.folder.array
    before = files_of(project)

    with monkeypatch.context() as patch:
        move_to(NUMERIC_VERSION + 1, patch)
        with project.context("tiny") as context:
            # A shard that was queued before the move, and the array: one error, and nothing is written.
            for step in (lambda: embed_shard(context, 1), lambda: finish_array(context)):
                with pytest.raises(
                    UserError, match=r"there is no plan at .*materialize obs_id_plan of this release first"
                ):
                    step()
            assert files_of(project) == before
            make_plan(context)
            assert context.folder.array != old
            assert embed_shard(context, 0).megabatches_computed > 0
        after = files_of(project)
        assert {name: after[name] for name in before} == before

    # Rolled back: the old array goes on from where it was.
    with project.context("tiny") as context:
        assert context.folder.array == old
        assert embed_shard(context, 0).megabatches_computed == 0
        for shard in range(1, SHARDS):
            embed_shard(context, shard)
        assert finish_array(context).totals.cells == 200


def test_the_page_quotes_what_is_said(project: Project) -> None:
    tiny(project, shards=SHARDS)
    with project.context("tiny") as context, pytest.raises(UserError) as caught:
        embed_shard(context, 1)
    (quoted,) = re.findall(r"^ *> (.*)$", PAGE, flags=re.MULTILINE)
    start, end = quoted.split("...")
    assert str(caught.value).startswith(start.strip())
    assert str(caught.value).endswith(end.strip())
