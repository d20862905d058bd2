"""A plan selects the right cells: joined and unknown labels, cells without counts, older schemas."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiledb
import tiledbsoma

from census_tf_dagster.census.labels import find_comparisons
from census_tf_dagster.census.plan import PlanTotals, read_plan
from census_tf_dagster.demo.census import Organism
from census_tf_dagster.errors import UserError
from census_tf_dagster.operate.dry_run import describe, dry_run
from census_tf_dagster.pipeline.finish_array import finish_array
from census_tf_dagster.pipeline.plan_release import PlanSummary, draft_plan, make_plan
from tests.support.builders import N_GENES, fill, tiny
from tests.support.project import Project

JOINED, SEVERAL = "COVID-19 || pneumonia", "COVID-19 || diabetes || pneumonia"


def join_labels(organism: Organism) -> None:
    """Give 24 cells COVID-19, ten of them with another disease, and one a label that merely contains its name."""
    labels = np.array(["normal"] * len(organism.cells), object)
    labels[20:34], labels[34:41], labels[41:44], labels[44] = "COVID-19", JOINED, SEVERAL, "post-COVID-19 disorder"
    organism.cells["disease"] = labels


def planned(project: Project, value_filter: str, **attributes: object) -> tuple[PlanSummary, np.ndarray]:
    """Draft a plan with another filter."""
    name = f"set{len(list((project.folder / 'sets').iterdir()))}"
    project.add_set(name, organism="homo_sapiens", value_filter=value_filter, **attributes)
    with project.context(name) as context:
        found = draft_plan(context)
    return found.summary, found.joinids


def test_joined_labels_that_a_filter_misses_are_counted_with_the_filter_that_takes_them(project: Project) -> None:
    tiny(project, change=join_labels)
    summary, joinids = planned(project, "disease == 'COVID-19'")
    assert len(joinids) == 14
    (warning,) = summary.warnings
    assert "`disease == 'COVID-19'` misses 10 cells whose disease joins that label" in warning
    wider = warning.partition("write: ")[2]
    assert wider == f"disease in ['COVID-19', '{SEVERAL}', '{JOINED}']"
    summary, joinids = planned(project, wider)
    assert (joinids.tolist(), summary.warnings) == (list(range(20, 44)), ())


@pytest.mark.parametrize(
    ("value_filter", "cells", "said", "fixed"),
    [
        ("disease in ['COVID-19', 'normal']", 189, "misses 10 cells", 199),
        ("disease != 'COVID-19' and nnz > 0", 186, "keeps 10 cells", 176),
        ("disease not in ['COVID-19']", 186, "keeps 10 cells", 176),
        ("('COVID-19' == attr('disease')) & (nnz > 0)", 14, "misses 10 cells", 24),
        (f"disease == '{JOINED}'", 7, "misses 3 cells", 10),
        (f"disease in ['COVID-19', '{JOINED}', '{SEVERAL}']", 24, "", 0),
        ("disease == 'post-COVID-19 disorder'", 1, "", 0),
        ("tissue == 'lung' or disease == 'normal'", None, "", 0),
    ],
)
def test_every_way_to_name_a_label(
    project: Project, value_filter: str, cells: int | None, said: str, fixed: int
) -> None:
    tiny(project, change=join_labels)
    summary, joinids = planned(project, value_filter)
    assert cells in (len(joinids), None)
    assert [said in warning for warning in summary.warnings] == ([True] if said else [])
    for warning in summary.warnings:
        assert len(planned(project, warning.partition("write: ")[2])[1]) == fixed


def test_missed_cells_are_those_of_the_sets_mod(project: Project) -> None:
    tiny(project, change=join_labels)
    summary, joinids = planned(project, "disease == 'COVID-19'", mod=2)
    assert len(joinids) == 7
    assert "misses 5 cells" in summary.warnings[0]


def test_labels_that_a_column_does_not_have_are_named_with_the_nearest(project: Project) -> None:
    tiny(project, change=join_labels)
    summary, joinids = planned(project, "disease in ['normal', 'Covid19']")
    assert len(joinids) == 175
    assert summary.warnings == ("value_filter: no cell has disease 'Covid19'; the nearest are 'COVID-19'",)
    with project.context("set1") as context:
        assert "WARNING: value_filter: no cell has disease 'Covid19'" in describe(
            dry_run(context, None, recompute=False)
        )
    with pytest.raises(
        UserError, match=r"no cell has tissue 'lungs'; the nearest are 'lung'.* of the organism's 200 cells"
    ) as caught:
        planned(project, f"tissue == 'lungs' and donor_id in [{', '.join(map(repr, map(str, range(4000))))}]")
    assert len(str(caught.value)) < 600


def test_comparisons_with_numbers_and_flags_name_no_label() -> None:
    assert find_comparisons("nnz > 3 and is_primary_data == True and 1 <= raw_sum < 5") == []
    (one,) = find_comparisons(" (nnz > 3) | (attr('tissue') != val('lung')) ")
    assert (one.column, one.labels, one.chosen) == ("tissue", ("lung",), False)
    assert one.with_labels(["lung", "liver"]) == "(nnz > 3) | (attr('tissue') not in ['lung', 'liver'])"


ZEROS = [3, 4, 150]


def empty_cells(organism: Organism) -> None:
    counts = organism.counts.tolil()
    counts[ZEROS] = 0
    emptied = counts.tocsr()
    object.__setattr__(organism, "counts", emptied)


def test_cells_without_counts_are_planned_counted_and_named(project: Project) -> None:
    tiny(project, change=empty_cells)
    with project.context("tiny") as context:
        summary = make_plan(context)
        assert summary.totals.cells == 200
        assert (
            summary.totals.cells_without_counts
            == read_plan(context.store, context.folder.plan).totals.cells_without_counts
            == 3
        )
        listed = pq.read_table(context.folder.obs_ids).to_pandas()
        assert "3 without counts" in describe(dry_run(context, None, recompute=False))
    assert listed.soma_joinid[listed.zero_counts].tolist() == ZEROS
    assert len(listed) == 200


def drop(uri: str, *columns: str) -> None:
    evolution = tiledb.ArraySchemaEvolution()
    for column in columns:
        evolution.drop_attribute(column)
    evolution.array_evolve(uri)


def test_a_release_of_schema_1_0(project: Project) -> None:
    """Make a release like 2023-05-15 and 2023-07-25: no statistics of counts, no observation_joinid, plain text."""
    tiny(project, value_filter="is_primary_data == True", reuse=True, gene_order="vocabulary")
    organism = project.census / "census_data" / "homo_sapiens"
    statistics = ("raw_sum", "nnz", "raw_mean_nnz", "raw_variance_nnz", "n_measured_vars")
    with project.context("tiny") as context:
        full = draft_plan(context).summary
    drop(str(organism / "obs"), *statistics, "observation_joinid")
    drop(str(organism / "ms" / "RNA" / "var"), "nnz", "n_measured_obs")
    with project.context("tiny") as context:
        assert context.genes.cells_expressing is None
        summary = make_plan(context)
        assert summary.totals.cells == full.totals.cells == 180
        assert summary.totals.tokens == pytest.approx(full.totals.tokens, rel=0.1)
        assert summary.known_share == pytest.approx(full.known_share, abs=0.05)
        assert summary.totals.cells_without_counts is None
        assert any("does not state how many genes cells express (schema 1.0)" in one for one in summary.warnings)
        assert pq.read_table(context.folder.obs_ids)["zero_counts"].null_count == 180
        fill(context)
        assert finish_array(context).totals.cells == 180


def test_var_alone_without_nnz(project: Project) -> None:
    tiny(project)
    drop(str(project.census / "census_data" / "homo_sapiens" / "ms" / "RNA" / "var"), "nnz")
    with project.context("tiny") as context:
        assert draft_plan(context).summary.totals.cells_without_counts == 0


def test_joinids_far_apart_take_no_memory(project: Project) -> None:
    tiny(project)
    far = 2**40
    obs_uri = str(project.census / "census_data" / "homo_sapiens" / "obs")
    counts_uri = str(project.census / "census_data" / "homo_sapiens" / "ms" / "RNA" / "X" / "raw")
    with tiledbsoma.open(obs_uri) as obs, tiledbsoma.open(counts_uri) as counts:
        row = obs.read(coords=((199,),)).concat()
        values = counts.read(coords=((199,), slice(None))).tables().concat()
    with tiledbsoma.open(obs_uri, "w") as obs:
        obs.tiledbsoma_resize_soma_joinid_shape(far + 1)
    with tiledbsoma.open(obs_uri, "w") as obs:
        obs.write(row.set_column(0, "soma_joinid", pa.array([far])))
    with tiledbsoma.open(counts_uri, "w") as counts:
        counts.resize((far + 1, N_GENES))
    with tiledbsoma.open(counts_uri, "w") as counts:
        counts.write(values.set_column(0, "soma_dim_0", pa.array(np.full(len(values), far))))
    with project.context("tiny") as context:
        array = fill(context)
        assert (array.rows, finish_array(context).totals.cells) == (far + 1, 201)


def widen(uri: str, domain: list[int]) -> None:
    """Replace an array by one from before SOMA 1.15, whose shape is as large as its type allows."""
    with tiledbsoma.open(uri) as array:
        content = array.read().tables().concat()
    old = tiledb.ArraySchema.load(uri)
    with tiledb.open(uri) as array:
        metadata = dict(array.meta.items())
    dims = [tiledb.Dim(f"soma_dim_{i}", domain=(0, last), tile=2048, dtype="int64") for i, last in enumerate(domain)]
    schema = tiledb.ArraySchema(tiledb.Domain(dims), [tiledb.Attr("soma_data", dtype=old.attr(0).dtype)], sparse=True)
    tiledb.VFS().remove_dir(uri)
    tiledb.Array.create(uri, schema)
    with tiledb.open(uri, "w") as array:
        array[content["soma_dim_0"].to_numpy(), content["soma_dim_1"].to_numpy()] = content["soma_data"].to_numpy()
        for key, value in metadata.items():
            array.meta[key] = value


def test_shapes_of_before_soma_1_15(project: Project) -> None:
    tiny(project, reuse=True, gene_order="vocabulary")
    measurement = project.census / "census_data" / "homo_sapiens" / "ms" / "RNA"
    widen(str(measurement / "X" / "raw"), [2**31 - 3, 2**31 - 3])
    widen(str(measurement / "feature_dataset_presence_matrix"), [2**31 - 3, 2**31 - 3])
    with project.context("tiny") as context:
        assert context.release.counts.shape[1] > N_GENES
        keys = draft_plan(context).keys
    assert keys is not None
    assert keys.any(axis=1).all()


def test_a_gene_twice_that_the_checkpoint_does_not_know(project: Project) -> None:
    def twice(organism: Organism) -> None:
        organism.genes["feature_id"] = [
            f"{gene}.{row}" if row == 1 else gene for row, gene in enumerate(organism.genes["feature_id"])
        ]
        organism.genes.loc[1, "feature_id"] = organism.genes.loc[0, "feature_id"] + ".2"

    tiny(project, change=twice)
    with project.context("tiny") as context:
        assert context.genes.repeated() == ["ENSG00000000000"]
        assert isinstance(draft_plan(context).summary.totals, PlanTotals)
