"""Exactly the unchanged cells of an earlier release are reused, with unchanged values."""

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiledbsoma

from census_tf_dagster.census.plan import Plan, read_plan
from census_tf_dagster.errors import UserError
from census_tf_dagster.identity import RELEASE_FIELDS, Identity
from census_tf_dagster.pipeline.context import ReleaseContext
from census_tf_dagster.pipeline.copy_shard import CopySummary, copy_shard
from census_tf_dagster.pipeline.embed_shard import embed_shard
from census_tf_dagster.pipeline.finish_array import array_state, finish_array
from census_tf_dagster.pipeline.plan_release import draft_plan, make_plan
from census_tf_dagster.store.array import EmbeddingsArray
from census_tf_dagster.store.committed import missing_megabatches
from census_tf_dagster.store.write_notes import NoteWriter, Written
from tests.support.builders import value_of
from tests.support.project import BOUND, RELEASE, Project, read_array, relative_errors
from tests.support.releases import EARLIER, Contents, TwoReleases, fill_planned, two_releases, verify_earlier

pytestmark = pytest.mark.takes(170)


def reused_joinids(context: ReleaseContext) -> np.ndarray:
    """Return the joinids that the written plan copies, ascending."""
    plan = read_plan(context.store, context.folder.plan)
    copied = [batch for batch in plan.megabatches if batch.reused]
    return np.sort(np.concatenate([np.empty(0, np.int64), *plan.read_ids(context.store, copied)]))


def planned_reuse(releases: TwoReleases) -> np.ndarray:
    with releases.project.context("reusing") as context:
        make_plan(context)
        return reused_joinids(context)


def run(context: ReleaseContext, *, copy_first: bool) -> tuple[int, int]:
    """Finish all shards; return the numbers of computed and of copied cells."""
    computed = copied = 0
    for shard in range(context.settings.shards):
        steps: list[Callable[[], None]] = []

        def compute(shard: int = shard) -> None:
            nonlocal computed
            computed += embed_shard(context, shard).cells_computed

        def copy(shard: int = shard) -> None:
            nonlocal copied
            copied += copy_shard(context, shard).cells_copied

        steps = [copy, compute] if copy_first else [compute, copy]
        for step in steps:
            step()
    return computed, copied


@pytest.mark.parametrize("copy_first", [True, False])
def test_a_release_pays_only_for_its_new_cells(project: Project, copy_first: bool) -> None:
    """The later array equals a full recomputation, and exactly the new and revised cells were computed."""
    releases = two_releases(project, megabatch_size=24)
    project.add_set("whole", organism="homo_sapiens", gene_order="vocabulary")
    with project.context("reusing", EARLIER) as context:
        assert make_plan(context).cells_reused == 0
        assert run(context, copy_first=False) == (200, 0)
        finish_array(context)
    unchanged = releases.unchanged()
    with project.context("reusing") as context:
        summary = make_plan(context)
        assert (summary.cells_reused, summary.totals.cells_to_compute) == (160, 60)
        assert summary.totals.source is not None
        assert summary.totals.source.release == EARLIER
        assert "reuses 160 cells (72.7%;" in summary.reuse()
        assert np.array_equal(reused_joinids(context), unchanged)
        assert run(context, copy_first=copy_first) == (60, 160)
        # The last run of each shard has read it back.
        assert finish_array(context).read_again == ()
        assert array_state(context) == "verified"
        found = read_array(context.folder.array, project.folder)
    with project.context("whole") as context:
        make_plan(context)
        run(context, copy_first=False)
        reference = read_array(context.folder.array, project.folder)
    assert np.array_equal(found.ids, np.arange(220))
    assert np.array_equal(found.ids, reference.ids)
    assert found.stored_values == 220 * 16
    assert relative_errors(found.values, reference.values).max() <= BOUND


def test_a_cell_that_was_set_aside_earlier_is_computed(project: Project) -> None:
    releases = two_releases(project)
    joinid = releases.unchanged()[0]
    lost = int(np.flatnonzero(releases.earlier.rows == releases.later.rows[joinid])[0])
    with project.context("reusing", EARLIER) as context:
        make_plan(context)
        plan = read_plan(context.store, context.folder.plan)
        array = EmbeddingsArray.open(context.folder.array, context.store, context.identity)
        for batch, ids in zip(plan.megabatches, plan.read_ids(context.store, plan.megabatches), strict=True):
            kept = ids[ids != lost]
            reasons = {lost: "for a test"} if lost in ids else {}
            values = value_of(kept, 16)
            NoteWriter(context.store, context.folder, plan, batch.shard).note(Written.of(batch, kept, values, reasons))
            array.write(kept, values)
        assert finish_array(context).set_aside == {lost: "for a test"}
    with project.context("reusing") as context:
        assert make_plan(context).cells_reused == 159
        assert joinid not in reused_joinids(context)
        fill_planned(context)
        assert sum(copy_shard(context, shard).cells_copied for shard in range(4)) == 159
        assert finish_array(context).cells == 220


def test_copies_are_the_earlier_values(project: Project) -> None:
    releases = two_releases(project)
    verify_earlier(releases)
    with project.context("reusing") as context:
        make_plan(context)
        fill_planned(context)
        assert sum(copy_shard(context, shard).cells_copied for shard in range(4)) == 160
        finish_array(context)
        stored = read_array(context.folder.array, project.folder)
    place = {int(row): joinid for joinid, row in enumerate(releases.earlier.rows)}
    unchanged = releases.unchanged()
    earlier = np.array([place[int(row)] for row in releases.later.rows[unchanged]])
    assert np.array_equal(stored.values[unchanged], value_of(earlier, 16))
    rest = np.setdiff1d(np.arange(220), unchanged)
    assert np.array_equal(stored.values[rest], value_of(rest, 16))


@pytest.mark.parametrize("gene_order", ["vocabulary", "census"])
def test_a_run_that_copies_needs_no_checkpoint(project: Project, gene_order: str) -> None:
    releases = two_releases(project, gene_order=gene_order, shuffle_genes=gene_order == "vocabulary", shards=1)
    verify_earlier(releases)
    with project.context("reusing") as context:
        make_plan(context)
    shutil.rmtree(project.checkpoint)
    shutil.rmtree(project.folder / "cache", ignore_errors=True)
    assert project.command("release", "add", RELEASE).returncode == 0
    done = project.materialize("reusing/reused_embeddings", f"{RELEASE}|0")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    stored = read_array(project.array("reusing"), project.folder)
    assert np.array_equal(stored.ids, releases.unchanged())


def test_with_the_order_of_the_release_nothing_wrong_is_reused(project: Project) -> None:
    releases = two_releases(project, gene_order="census")
    verify_earlier(releases)
    assert len(planned_reuse(releases)) == 0


def test_with_the_order_of_the_release_unchanged_all_is_reused(project: Project) -> None:
    releases = two_releases(project, gene_order="census", shuffle_genes=False)
    verify_earlier(releases)
    assert np.array_equal(planned_reuse(releases), releases.unchanged())


def of_one_dataset(contents: Contents) -> np.ndarray:
    """Return cells of a dataset that both releases have."""
    first = contents.cells["dataset_id"].eq(contents.cells["dataset_id"][np.flatnonzero(contents.rows < 20)[0]])
    return np.flatnonzero(first)


def revise(contents: Contents) -> np.ndarray:
    cells = of_one_dataset(contents)
    contents.cells.loc[cells, "dataset_version_id"] = "another version"
    return cells


def move(contents: Contents) -> np.ndarray:
    cells = of_one_dataset(contents)
    contents.cells.loc[cells, "dataset_id"] = "another dataset"
    return cells


def rename(contents: Contents) -> np.ndarray:
    cells = of_one_dataset(contents)[3:6]
    contents.cells.loc[cells, "observation_joinid"] = ["9999999997", "9999999998", "9999999999"]
    return cells


def swap_assay(contents: Contents) -> np.ndarray:
    cells = of_one_dataset(contents)[:2]
    contents.cells.loc[cells, "assay"] = "assay of no vocabulary, either"
    return cells


def double_one_count(contents: Contents) -> np.ndarray:
    cells = of_one_dataset(contents)[4:5]
    contents.counts.data[contents.counts.indptr[cells[0]]] += 1
    return cells


def drop_one_gene(contents: Contents) -> np.ndarray:
    """Move a count within a cell: another cell keeps the gene in the dataset, and `raw_sum` stays."""
    cells = of_one_dataset(contents)
    counts = contents.counts
    often = np.bincount(counts[cells].indices, minlength=counts.shape[1])
    for cell in cells:
        part = slice(counts.indptr[cell], counts.indptr[cell + 1])
        common = np.flatnonzero(often[counts.indices[part]] > 1)
        if len(common) > 1:
            counts.data[part][common[1]] += counts.data[part][common[0]]
            counts.data[part][common[0]] = 0
            return np.array([cell])
    raise AssertionError("no cell with two common genes")


def add_a_gene(contents: Contents) -> np.ndarray:
    """A gene that is new in a dataset changes its sequence of genes, for all its cells."""
    cells = of_one_dataset(contents)
    lil = contents.counts.tolil()
    known = [i for i, gene in enumerate(contents.genes["feature_id"]) if int(gene[4:]) >= 6]
    gene = known[0]
    lil[cells, gene] = 0
    contents.counts = lil.tocsr()
    contents.counts.eliminate_zeros()
    return cells


def empty_joinid(contents: Contents) -> np.ndarray:
    cells = of_one_dataset(contents)[7:8]
    contents.cells.loc[cells, "observation_joinid"] = ""
    return cells


def repeat_a_cell(contents: Contents) -> np.ndarray:
    """Two cells with the same key are ambiguous, so both are computed."""
    one, other = cells = of_one_dataset(contents)[:2]
    for name in contents.cells.columns:
        contents.cells.loc[other, name] = contents.cells.loc[one, name]
    lil = contents.counts.tolil()
    lil[other] = lil[one]
    contents.counts = lil.tocsr()
    # The dataset keeps all its genes only if another cell has them. Otherwise all its cells are computed, too.
    return cells


CHANGES = [revise, move, rename, swap_assay, double_one_count, drop_one_gene, add_a_gene, empty_joinid, repeat_a_cell]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_differs_in_one_part_of_the_rule_is_computed(
    project: Project, change: Callable[[Contents], np.ndarray]
) -> None:
    changed: list[np.ndarray] = []
    releases = two_releases(project, change=lambda later: changed.append(change(later)))
    verify_earlier(releases)
    reused = planned_reuse(releases)
    assert len(changed[0])
    assert not np.isin(changed[0], reused).any()
    dataset = np.flatnonzero(releases.later.cells["dataset_id"] == releases.later.cells["dataset_id"][changed[0][0]])
    untouched = np.setdiff1d(releases.unchanged(), dataset)
    assert np.isin(untouched, reused).all()
    if change not in (repeat_a_cell, revise, move, add_a_gene):
        assert np.array_equal(reused, np.setdiff1d(releases.unchanged(), changed[0]))


def test_cells_without_a_name_are_computed_though_both_releases_have_them(project: Project) -> None:
    nameless: list[np.ndarray] = []

    def forget(contents: Contents) -> None:
        nameless.append(np.flatnonzero(contents.rows == 7))
        contents.cells.loc[nameless[-1], "observation_joinid"] = ""

    releases = two_releases(project, change=forget, change_earlier=forget)
    verify_earlier(releases)
    assert np.array_equal(planned_reuse(releases), np.setdiff1d(releases.unchanged(), nameless[0]))


def rewrite_identity(root: Path, **changes: object) -> None:
    with tiledbsoma.open(str(root / "embeddings"), "w") as array:
        array.metadata["census_tf_identity"] = json.dumps(
            {**json.loads(array.metadata["census_tf_identity"]), **changes}, sort_keys=True
        )


VALUES = [name for name in Identity.__dataclass_fields__ if name not in RELEASE_FIELDS]


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> TwoReleases:
    releases = two_releases(Project(tmp_path_factory.mktemp("verified")))
    verify_earlier(releases)
    return releases


@pytest.mark.parametrize("name", VALUES)
def test_an_array_of_another_identity_is_passed_over(verified: TwoReleases, name: str) -> None:
    with verified.project.context("reusing", EARLIER) as context:
        root, right = Path(context.folder.root), getattr(context.identity, name)
    with verified.project.context("reusing") as context:
        assert draft_plan(context).summary.cells_reused == 160
        rewrite_identity(root, **{name: 17 if isinstance(right, int) else "another"})
        try:
            summary = draft_plan(context).summary
        finally:
            rewrite_identity(root, **{name: right})
    assert (summary.cells_reused, summary.totals.source) == (0, None)
    assert summary.passed_over == (f"{EARLIER}/{root.name}: other {name}",)
    assert "reuses nothing" in summary.reuse()


def test_what_of_an_identity_decides_values_is_known() -> None:
    """A new field of the identity counts as deciding values, unless it is listed as not doing so."""
    assert VALUES == [
        "organism",
        "gene_order",
        "checkpoint_fingerprint",
        "compute_precision",
        "storage_precision",
        "embedding_dim",
        "fractional_counts",
        "numeric_version",
    ]


def unverify(context: ReleaseContext, plan: Plan) -> str:
    array = EmbeddingsArray.open(context.folder.array, context.store, context.identity)
    (ids,) = plan.read_ids(context.store, plan.megabatches[:1])
    array.write(ids, np.ones((len(ids), 16), np.float32))
    return "its array is stale"


def forget_keys(context: ReleaseContext, plan: Plan) -> str:
    Path(plan.keys).unlink()
    return "its plan was made without `reuse`, so it has no keys"


def lose_plan(context: ReleaseContext, plan: Plan) -> str:
    (Path(context.folder.plan) / "current.json").unlink()
    return "there is no plan"


@pytest.mark.parametrize("damage", [unverify, forget_keys, lose_plan], ids=lambda damage: damage.__name__)
def test_an_array_that_is_not_verified_or_has_no_keys_is_passed_over(
    project: Project, damage: Callable[[ReleaseContext, Plan], str]
) -> None:
    releases = two_releases(project)
    verify_earlier(releases)
    with project.context("reusing", EARLIER) as context:
        reason = damage(context, read_plan(context.store, context.folder.plan))
    with project.context("reusing") as context:
        summary = make_plan(context)
    assert summary.cells_reused == 0
    assert reason in summary.passed_over[0]


def test_without_a_presence_matrix_the_whole_axis_counts(project: Project) -> None:
    releases = two_releases(project, gene_order="census", shuffle_genes=False)
    for release in (EARLIER, RELEASE):
        uri = f"{project.folder}/census/{release}/census_data/homo_sapiens/ms/RNA"
        with tiledbsoma.open(uri, "d") as measurement:
            del measurement["feature_dataset_presence_matrix"]
    verify_earlier(releases)
    assert np.array_equal(planned_reuse(releases), releases.unchanged())


def test_a_damaged_key_file_is_no_reason_to_reuse(project: Project) -> None:
    releases = two_releases(project)
    verify_earlier(releases)
    with project.context("reusing", EARLIER) as context:
        keys = Path(read_plan(context.store, context.folder.plan).keys)
    keys.write_bytes(keys.read_bytes()[:-100])
    with project.context("reusing") as context:
        summary = make_plan(context)
        assert summary.cells_reused == 0
        assert "cannot be read" in summary.passed_over[0]


@pytest.mark.parametrize("damage", ["removed", "stale", "another identity"])
def test_a_source_that_was_damaged_is_named_and_planning_again_computes(project: Project, damage: str) -> None:
    releases = two_releases(project)
    verify_earlier(releases)
    with project.context("reusing") as context:
        assert make_plan(context).cells_reused == 160
        copied = copy_shard(context, 0).cells_copied
        assert copied
        with project.context("reusing", EARLIER) as earlier:
            root = Path(earlier.folder.root)
            if damage == "removed":
                shutil.rmtree(root)
            elif damage == "stale":
                unverify(earlier, read_plan(earlier.store, earlier.folder.plan))
            else:
                rewrite_identity(root, mod=7)
        with pytest.raises(UserError, match=r"materialize obs_id_plan of this release again. Its new plan computes"):
            copy_shard(context, 1)
        summary = make_plan(context)
        assert summary.cells_reused == 0 or damage == "another identity"
        fill_planned(context)
        for shard in range(4):
            copy_shard(context, shard)
        finish_array(context)


def test_resume_reads_metadata_alone_though_ranges_overlap(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every second cell new, so that each range of copies overlaps ranges of computed cells."""

    def alternate(later: Contents) -> None:
        unknown = np.arange(0, len(later.rows), 2)
        later.cells.loc[unknown, "observation_joinid"] = [f"new {i}" for i in unknown]

    releases = two_releases(project, change=alternate)
    verify_earlier(releases)
    with project.context("reusing") as context:
        make_plan(context)
        plan = read_plan(context.store, context.folder.plan)
        firsts = [(batch.first, batch.last, batch.reused) for batch in plan.shard(1)]
        assert any(a[1] > b[0] and a[2] != b[2] for a, b in itertools.pairwise(firsts))
        fill_planned(context)
        array = EmbeddingsArray.open(context.folder.array, context.store, context.identity)
        with monkeypatch.context() as patched:
            patched.setattr(EmbeddingsArray, "joinids_between", lambda *_: pytest.fail("read"))
            assert all(batch.reused for batch in missing_megabatches(array, plan, plan.megabatches, {}))

            class Killed(Exception):
                pass

            def die(progress: CopySummary) -> None:
                if progress.megabatches_copied == 1:
                    raise Killed

            with pytest.raises(Killed):
                copy_shard(context, 1, report=die)
            rest = copy_shard(context, 1)
            assert (rest.megabatches_copied, rest.verified) == (rest.megabatches - 1, True)
            assert copy_shard(context, 1).megabatches_copied == 0
            assert copy_shard(context, 1, recompute=True).megabatches_copied == rest.megabatches
        with pytest.raises(UserError, match=r"3 of 4 shards .*: reused_embeddings of 3, e.g. \[0, 2, 3\]"):
            finish_array(context)
        for shard in (0, 2, 3):
            copy_shard(context, shard)
        finish_array(context)


def test_whoever_ends_last_reads_the_shard_back(project: Project) -> None:
    releases = two_releases(project)
    verify_earlier(releases)
    with project.context("reusing") as context:
        make_plan(context)
        plan = read_plan(context.store, context.folder.plan)
        kinds = [{batch.reused for batch in plan.shard(shard)} for shard in range(4)]
        shard = kinds.index({True, False})
        assert not copy_shard(context, shard).verified
        fill_planned(context, shard=shard)
        assert copy_shard(context, shard).verified


def test_a_plan_without_reuse_is_as_it_was(project: Project) -> None:
    """A set with `reuse` that finds nothing to reuse has the same plan hash and files, byte for byte."""
    two_releases(project)
    project.add_set("whole", organism="homo_sapiens", gene_order="vocabulary", megabatch_size=16)
    files = {}
    for name in ("reusing", "whole"):
        with project.context(name) as context:
            totals = make_plan(context).totals
            files[name] = {path.name: path.read_bytes() for path in Path(context.folder.plan).iterdir()}
    assert files["reusing"].pop(f"{totals.plan}.keys.parquet")
    assert files["reusing"] == files["whole"]
    assert "source" not in json.loads(files["whole"]["current.json"])


def test_planning_again_gives_the_same_plan(project: Project) -> None:
    releases = two_releases(project)
    verify_earlier(releases)
    with project.context("reusing") as context:
        assert make_plan(context) == make_plan(context)
        plan = read_plan(context.store, context.folder.plan)
        assert plan.totals == make_plan(context).totals
        wider = replace(context, settings=context.settings.model_copy(update={"shards": 2}))
        assert make_plan(wider).totals.plan != plan.totals.plan


@pytest.mark.soak
@pytest.mark.parametrize("storage_precision", ["float32", "bfloat16"])
def test_two_releases_of_many_cells(project: Project, storage_precision: str) -> None:
    """Each release has 50,000 cells or more; 80 % of the datasets stay, others are revised, withdrawn or new."""
    each = 5000
    releases = two_releases(project, cells_each=each, megabatch_size=4096, storage_precision=storage_precision)
    project.add_set(
        "whole",
        organism="homo_sapiens",
        gene_order="vocabulary",
        megabatch_size=4096,
        storage_precision=storage_precision,
    )
    with project.context("reusing", EARLIER) as context:
        make_plan(context)
        assert run(context, copy_first=False) == (10 * each, 0)
        finish_array(context)
    with project.context("reusing") as context:
        assert make_plan(context).cells_reused == 8 * each
        assert np.array_equal(reused_joinids(context), releases.unchanged())
        assert run(context, copy_first=True) == (3 * each, 8 * each)
        assert finish_array(context).read_again == ()
        found = read_array(context.folder.array, project.folder)
    with project.context("whole") as context:
        make_plan(context)
        run(context, copy_first=False)
        reference = read_array(context.folder.array, project.folder)
    assert np.array_equal(found.ids, np.arange(11 * each))
    assert found.stored_values == 11 * each * 16
    if storage_precision == "float32":
        assert relative_errors(found.values, reference.values).max() <= BOUND
        return
    steps = np.abs(found.values.view(np.int32) - reference.values.view(np.int32)) >> 16
    assert steps.max() <= 1
    assert np.mean(steps > 0) < 1e-3
