"""A tiny project goes from plan to array: resume, recompute, verification, identity, precision."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiledbsoma

from census_tf_dagster.census.plan import read_plan
from census_tf_dagster.errors import UserError
from census_tf_dagster.pipeline.context import ReleaseContext
from census_tf_dagster.pipeline.embed_shard import ShardSummary, embed_shard
from census_tf_dagster.pipeline.finish_array import array_state, finish_array
from census_tf_dagster.pipeline.plan_release import make_plan
from census_tf_dagster.quality.sample import read_embeddings
from census_tf_dagster.store.array import EmbeddingsArray, round_to_bfloat16
from census_tf_dagster.store.verification import VerificationError, verify_shard
from tests.support.builders import tiny
from tests.support.project import Project, read_array

pytestmark = pytest.mark.takes(50)


def run_all(context: ReleaseContext) -> None:
    make_plan(context)
    for shard in range(context.settings.shards):
        embed_shard(context, shard)


def test_whole_job_reads_back_in_a_fresh_process(project: Project) -> None:
    tiny(project, value_filter="is_primary_data == True", mod=2)
    with project.context("tiny") as context:
        run_all(context)
        summary = finish_array(context)
        obs = context.release.obs.read(column_names=["soma_joinid", "is_primary_data"]).concat().to_pandas()
    planned = obs.soma_joinid[obs.is_primary_data & (obs.soma_joinid % 2 == 0)].to_numpy()
    stored = read_array(project.array("tiny"), project.folder)
    assert 0 < len(planned) < 100
    assert np.array_equal(stored.ids, planned)
    assert stored.stored_values == len(planned) * 16
    assert stored.shape == (200, 16)
    assert np.isfinite(stored.values).all()
    assert json.loads(stored.metadata["census_tf_identity"])["mod"] == 2
    record = json.loads(stored.metadata["census_tf_record"])
    assert (record["cells"], record["plan"]) == (len(planned), summary.totals.plan)
    assert record["checkpoint"] == project.checkpoint.name


def test_a_restarted_shard_does_only_what_is_missing(project: Project) -> None:
    tiny(project, megabatch_size=8)
    with project.context("tiny") as context:
        make_plan(context)
        plan = read_plan(context.store, context.folder.plan)
        total = len(plan.shard(1))

        class Killed(Exception):
            pass

        def die(progress: ShardSummary) -> None:
            if progress.megabatches_computed == 2:
                raise Killed

        with pytest.raises(Killed):
            embed_shard(context, 1, report=die)
        rest = embed_shard(context, 1)
        assert (rest.megabatches, rest.megabatches_computed) == (total, total - 2)
        again = embed_shard(context, 1)
        assert (again.megabatches_computed, again.cells) == (0, rest.cells)
        assert embed_shard(context, 1, recompute=True).megabatches_computed == total
        array = EmbeddingsArray.open(context.folder.array, context.store, context.identity)
        planned = np.concatenate(plan.read_ids(context.store, plan.shard(1)))
        assert np.array_equal(array.joinids_between(0, 199), planned)


def test_resume_after_consolidation_and_under_another_plan(project: Project) -> None:
    """Fragments that match no megabatch are read instead of computed again."""
    tiny(project)
    with project.context("tiny") as context:
        run_all(context)
        wider = replace(context, settings=context.settings.model_copy(update={"shards": 2, "megabatch_size": 37}))
        make_plan(wider)
        assert [embed_shard(wider, shard).megabatches_computed for shard in range(2)] == [0, 0]
        finish_array(wider)


def test_recompute_makes_the_verification_stale_and_finishing_reads_again(project: Project) -> None:
    tiny(project)
    with project.context("tiny") as context:
        run_all(context)
        assert array_state(context) == "unverified"
        assert finish_array(context).read_again == ()
        assert array_state(context) == "verified"
        plan = read_plan(context.store, context.folder.plan)
        array = EmbeddingsArray.open(context.folder.array, context.store, context.identity)
        (ids,) = plan.read_ids(context.store, [plan.shard(2)[0]])
        array.write(ids, read_embeddings(array, ids))
        assert array_state(context) == "stale"
        assert finish_array(context).read_again == (2,)
        assert array_state(context) == "verified"


def test_shards_that_have_not_run_are_named(project: Project) -> None:
    tiny(project)
    with project.context("tiny") as context:
        make_plan(context)
        embed_shard(context, 0)
        with pytest.raises(UserError, match=r"3 of 4 shards have not finished, e.g. \[1, 2, 3\]"):
            finish_array(context)


def damage(context: ReleaseContext, joinids: list[int], values: np.ndarray) -> None:
    array = EmbeddingsArray.open(context.folder.array, context.store, context.identity)
    array.write(np.array(joinids), values.astype(np.float32))


def test_verification_fails_on_values_that_are_not_finite(project: Project) -> None:
    tiny(project)
    with project.context("tiny") as context:
        run_all(context)
        damage(context, [7], np.full((1, 16), np.nan))
        with pytest.raises(VerificationError, match=r"1 cells have values that are not finite, joinids \[7\]"):
            finish_array(context)


def test_verification_fails_on_an_unplanned_cell(project: Project) -> None:
    tiny(project, mod=2)
    with project.context("tiny") as context:
        run_all(context)
        damage(context, [199], np.ones((1, 16)))
        with pytest.raises(VerificationError, match=r"1 cells are in the array but not planned, joinids \[199\]"):
            finish_array(context)


def test_verification_fails_on_a_missing_cell(project: Project) -> None:
    tiny(project)
    with project.context("tiny") as context:
        make_plan(context)
        plan = read_plan(context.store, context.folder.plan)
        (ids,) = plan.read_ids(context.store, [plan.shard(0)[0]])
        damage(context, ids[:-1].tolist(), np.ones((len(ids) - 1, 16)))
        array = EmbeddingsArray.open(context.folder.array, context.store, context.identity)
        problems = verify_shard(array, plan, context.folder, 0).problems
        assert problems.first["missing"][0] == ids[-1]
        assert "planned cells are missing" in str(problems)


def test_bfloat16_storage_is_the_default_and_within_half_a_step(project: Project) -> None:
    tiny(project, storage_precision="float32")
    with project.context("tiny") as context:
        run_all(context)
        exact = read_array(context.folder.array, project.folder)
        rounded_job = context.settings.model_copy(update={"storage_precision": "bfloat16"})
    project.add_set("rounded", organism="homo_sapiens", megabatch_size=16, storage_precision="bfloat16")
    with project.context("rounded") as context:
        assert context.settings.storage_precision == rounded_job.storage_precision
        run_all(context)
        rounded = read_array(context.folder.array, project.folder)
    assert np.array_equal(rounded.values, round_to_bfloat16(exact.values))
    assert not np.any(rounded.values.view(np.uint32) & 0xFFFF)
    assert np.max(np.abs(rounded.values - exact.values) / np.abs(exact.values)) <= 2**-8


def test_round_to_bfloat16_is_half_to_even() -> None:
    import torch

    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 100_000, dtype=np.uint32)
    values = np.concatenate([bits.view(np.float32), np.array([1 + 2**-8, 1 + 3 * 2**-8, 0.0, -0.0], np.float32)])
    values = values[np.abs(np.nan_to_num(values, nan=np.inf)) < 1e38]
    expected = torch.from_numpy(values).to(torch.bfloat16).to(torch.float32).numpy()
    assert np.array_equal(round_to_bfloat16(values), expected)


def test_an_array_of_another_identity_is_refused_with_both_shown(project: Project) -> None:
    tiny(project)
    with project.context("tiny") as context:
        make_plan(context)
        other = replace(context.identity, compute_precision="bf16", mod=3)
        with tiledbsoma.open(context.folder.array, "w") as array:
            array.metadata["census_tf_identity"] = other.to_json()
        before = sorted(Path(context.folder.root).rglob("*"))
        for step in (lambda: make_plan(context), lambda: embed_shard(context, 0), lambda: finish_array(context)):
            with pytest.raises(UserError) as caught:
                step()
            assert "mod: stored 3, this run 1" in str(caught.value)
            assert "compute_precision: stored 'bf16', this run 'fp32'" in str(caught.value)
        assert sorted(Path(context.folder.root).rglob("*")) == before


def test_two_identities_of_a_set_stand_side_by_side(project: Project) -> None:
    tiny(project)
    with project.context("tiny") as context:
        make_plan(context)
        changed = context.settings.model_copy(update={"mod": 2})
    with project.context("tiny") as context:
        first = context.folder.root
    (project.folder / "sets" / "tiny" / "defs.yaml").unlink()
    (project.folder / "sets" / "tiny").rmdir()
    project.add_set("tiny", organism="homo_sapiens", mod=changed.mod)
    with project.context("tiny") as context:
        make_plan(context)
        assert context.folder.root != first
        assert Path(first).is_dir()


def test_planning_is_idempotent(project: Project) -> None:
    tiny(project)
    with project.context("tiny") as context:
        assert make_plan(context) == make_plan(context)
        assert len(list(Path(context.folder.plan).glob("*.parquet"))) == 2


def test_no_matching_cell_shows_the_filter(project: Project) -> None:
    tiny(project, value_filter="tissue_general == 'moon'")
    with project.context("tiny") as context, pytest.raises(UserError, match="tissue_general == 'moon'"):
        make_plan(context)
    assert not (project.folder / "store").exists()


def test_a_filter_over_a_column_that_is_not_there(project: Project) -> None:
    tiny(project, value_filter="no_such_column == 'x'")
    with project.context("tiny") as context, pytest.raises(UserError, match="was not understood"):
        make_plan(context)
    assert not (project.folder / "store").exists()


def test_a_damaged_verification_verifies_nothing_and_is_made_anew(project: Project) -> None:
    tiny(project)
    with project.context("tiny") as context:
        run_all(context)
        plan = read_plan(context.store, context.folder.plan)
        Path(context.folder.verification(plan.totals.plan, 1)).write_bytes(b"")
        assert embed_shard(context, 1).megabatches_computed == 0
        assert finish_array(context).read_again == ()
        Path(context.folder.verification(plan.totals.plan, 1)).write_bytes(b"")
        assert finish_array(context).read_again == (1,)


@pytest.mark.parametrize("joinids", [[3, 2], [3, 3], [-1, 3], [3, 200], []])
def test_a_write_takes_only_ascending_joinids_of_the_census(project: Project, joinids: list[int]) -> None:
    """TileDB's own checks are off, because they take a third of a write."""
    tiny(project)
    with project.context("tiny") as context:
        make_plan(context)
        array = EmbeddingsArray.open(context.folder.array, context.store, context.identity)
        with pytest.raises(ValueError, match="joinids must be strictly ascending in 0 to 199"):
            array.write(np.array(joinids, np.int64), np.ones((len(joinids), 16), np.float32))
        assert array.fragments() == []
