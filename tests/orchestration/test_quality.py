"""The quality report of real arrays, good ones and ones that were damaged on purpose."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pandas as pd
import pytest
import tiledb
import tiledbsoma
from PIL import Image

from census_tf_dagster.census.plan import read_plan
from census_tf_dagster.config.dagster_names import title_of
from census_tf_dagster.demo.census import Organism, build_census
from census_tf_dagster.demo.synthetic import KNOWN_ASSAYS, synthetic_organism
from census_tf_dagster.errors import UserError
from census_tf_dagster.pipeline import assess_quality as step
from census_tf_dagster.pipeline.assess_quality import assess
from census_tf_dagster.pipeline.context import ReleaseContext
from census_tf_dagster.pipeline.plan_release import make_plan
from census_tf_dagster.quality import pictures
from census_tf_dagster.quality.report import Report
from tests.support.builders import N_GENES, tiny
from tests.support.finished import Values, by_type, finish, obs_of
from tests.support.in_process import Deployment
from tests.support.project import RELEASE, Project, read_array

pytestmark = pytest.mark.takes(100)

CELLS = 900
LATER = "2026-05-08"


def collapsed(joinids: np.ndarray, types: np.ndarray) -> np.ndarray:
    values = by_type(joinids, types)
    values[:, 3] = 0.5
    return values


def shuffled(joinids: np.ndarray, types: np.ndarray) -> np.ndarray:
    """Each cell has the embedding of some other cell."""
    return np.random.default_rng(3).permutation(by_type(joinids, types))


def shifted(joinids: np.ndarray, types: np.ndarray) -> np.ndarray:
    return by_type(joinids, types, seed=1) + np.float32(0.5)


def report_of(project: Project, release: str = RELEASE) -> Report:
    with project.context("tiny", release) as context:
        return assess(context)


def stored(project: Project) -> tuple[Path, dict[str, Any]]:
    (folder,) = (project.folder / "store" / "tiny" / RELEASE).glob("*/qc")
    return folder, json.loads((folder / "report.json").read_text())


def make_good(project: Project) -> Project:
    tiny(project, cells=CELLS, megabatch_size=64, value_filter="is_primary_data == True")
    finish(project, by_type)
    return project


@pytest.fixture
def good(project: Project) -> Project:
    return make_good(project)


@pytest.fixture(scope="module")
def assessed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Report]:
    """A good array and its report, for tests that change neither."""
    project = make_good(Project(tmp_path_factory.mktemp("assessed")))
    return project, report_of(project)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report without pictures and the UMAP that they show, which take nearly all of its time."""
    monkeypatch.setattr(step, "project", lambda embeddings, _: np.zeros((len(embeddings), 2), np.float32))
    for draw in ("_draw", "_draw_counts"):
        monkeypatch.setattr(step, draw, lambda *_: {})


def test_coverage_is_what_pandas_counts(assessed: tuple[Project, Report]) -> None:
    project, _ = assessed
    _, report = stored(project)
    obs = obs_of(project)
    present = read_array(project.array("tiny"), project.folder).ids
    assert 0 < len(present) < CELLS
    for column in ("cell_type", "tissue_general", "dataset_id", "assay"):
        names = obs[column].astype(str)
        expected = pd.DataFrame(
            {
                "cells": names.value_counts(),
                "planned": names[obs.is_primary_data].value_counts(),
                "embedded": names[present].value_counts(),
            }
        ).fillna(0)
        found = pd.DataFrame(report["coverage"][column]).set_index("name")
        pd.testing.assert_frame_equal(
            found.sort_index(), expected.sort_index().astype(int), check_names=False, check_dtype=False
        )
        assert found.planned.is_monotonic_decreasing


@pytest.mark.usefixtures("undrawn")
def test_a_shard_without_a_verification_counts_as_not_embedded(good: Project) -> None:
    (verification, *_) = sorted((good.folder / "store").rglob("verification/*/*.json"))
    verification.unlink()
    report_of(good)
    rows = pd.DataFrame(stored(good)[1]["coverage"]["assay"])
    with good.context("tiny") as context:
        missing = sum(batch.cells for batch in read_plan(context.store, context.folder.plan).shard(0))
    assert rows.planned.sum() - rows.embedded.sum() == missing > 0


def test_genes_per_cell_and_counts_outside_are_what_numpy_counts(assessed: tuple[Project, Report]) -> None:
    project, _ = assessed
    _, report = stored(project)
    obs = obs_of(project)
    genes = obs.nnz[obs.is_primary_data]
    found = report["genes_per_cell"]
    assert (found["window"], found["cells_over_window"]) == (63, int((genes > 63).sum()))
    assert 0 < found["cells_over_window"] < len(genes)
    assert found["quantile_0.5"] == np.quantile(genes, 0.5, method="inverted_cdf")
    uri = project.folder / "census" / RELEASE / "census_data" / "homo_sapiens" / "ms" / "RNA" / "X" / "raw"
    with tiledbsoma.open(str(uri)) as layer:
        table = layer.read().tables().concat().to_pandas()
    table = table[obs.is_primary_data.to_numpy()[table.soma_dim_0]]
    # `tiny` leaves the first six genes out of the vocabulary.
    outside = table.soma_data[table.soma_dim_1 < 6].sum() / table.soma_data.sum()
    assert report["vocabulary"]["cells_counted"] == len(genes)
    assert report["vocabulary"]["counts_outside"] == pytest.approx(outside)
    known = table[table.soma_dim_1 >= 6].groupby("soma_dim_0").size()
    assert report["vocabulary"]["cells_with_more_known_genes_than_the_window"] == (known > 63).sum()


PICTURES = {f"umap_{what}" for what in ("cell_type", "tissue", "dataset", "assay")} | {
    "genes_per_cell",
    "outside_vocabulary",
}


def test_pictures_are_real_and_the_same_every_time(assessed: tuple[Project, Report]) -> None:
    project, first = assessed
    folder, report = stored(project)
    assert set(report["pictures"]) == {f"{name}.png" for name in PICTURES} == {one.name for one in folder.glob("*.png")}
    for name in PICTURES:
        content = (folder / f"{name}.png").read_bytes()
        assert len(content) <= pictures.MOST_BYTES
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            assert image.format == "PNG"
            assert image.width >= 1000
            assert image.height >= 200
            # Something is drawn: many pixels are not paper.
            shades = np.asarray(image.convert("L"))
            assert 0.01 < (shades < 250).mean() < 0.6
    again = report_of(project)
    assert again.pictures == first.pictures
    assert again.about["sample"] == first.about["sample"]
    assert again.distribution.to_bytes() == first.distribution.to_bytes()


def test_colours_tell_cell_types_apart(assessed: tuple[Project, Report]) -> None:
    """Take the points' colours from the picture: as many strong ones as there are types, none in a shuffled place."""
    _, report = assessed
    with Image.open(io.BytesIO(report.pictures["umap_cell_type"])) as image:
        pixels = np.asarray(image.convert("RGB"))[78:-78, 50 : image.width * 58 // 100].reshape(-1, 3).astype(int)
    wanted = [[int(shade[i : i + 2], 16) for i in (1, 3, 5)] for shade in pictures.PALETTE[:6]]
    near = [int((np.abs(pixels - shade).max(axis=1) < 40).sum()) for shade in wanted]
    assert min(near) > 200, near


def test_a_picture_is_made_smaller_until_it_fits() -> None:
    rng = np.random.default_rng(0)
    labels = np.array([f"type {i}" for i in rng.integers(60, size=20_000)])
    content = pictures.scatter(rng.normal(size=(20_000, 2)).astype(np.float32), labels, "cell type", "all mixed", "")
    assert len(content) <= pictures.MOST_BYTES


def checks(report: Report) -> dict[str, bool]:
    return {name: verdict.passed for name, verdict in report.verdicts.items() if name != "same_as_upstream"}


GOOD = {
    "neighbours_share_cell_type": True,
    "no_collapsed_dimensions": True,
    "drift_from_previous_release": True,
    "gene_ids_fit_counts": True,
}


ZEROS = np.arange(0, CELLS, 9)


def empty_cells(organism: Organism) -> None:
    counts = organism.counts.tolil()
    counts[ZEROS] = 0
    object.__setattr__(organism, "counts", counts.tocsr())


def zeros_alike(joinids: np.ndarray, types: np.ndarray) -> np.ndarray:
    """Cells without counts lie far away from all others, nearly equal to each other."""
    values = by_type(joinids, types)
    rows = np.isin(joinids, ZEROS)
    values[rows] = 100 + 0.001 * values[rows]
    return values


@pytest.mark.parametrize("nnz", [True, False])
def test_cells_without_counts_are_left_out_of_what_is_measured(project: Project, nnz: bool) -> None:
    """With and without obs telling which ones they are."""
    tiny(project, cells=CELLS, megabatch_size=64, change=empty_cells)
    finish(project, zeros_alike)
    if not nnz:
        evolution = tiledb.ArraySchemaEvolution()
        evolution.drop_attribute("nnz")
        evolution.array_evolve(str(project.census / "census_data" / "homo_sapiens" / "obs"))
    report = report_of(project)
    assert checks(report) == GOOD
    assert report.verdicts["neighbours_share_cell_type"].figures["cells"] == CELLS - len(ZEROS)
    # Two heaps far apart have the variance of one dimension.
    assert float(report.verdicts["no_collapsed_dimensions"].figures["effective_rank"]) > 3
    sample = stored(project)[1]["sample"]
    assert (sample["cells"], sample["without_counts"]) == (CELLS, len(ZEROS))
    assert report.about["cells_without_counts"] == (len(ZEROS) if nnz else None)


def test_a_good_array_passes(assessed: tuple[Project, Report]) -> None:
    _, report = assessed
    assert checks(report) == GOOD


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("values", "check", "grave"),
    [(collapsed, "no_collapsed_dimensions", True), (shuffled, "neighbours_share_cell_type", False)],
)
def test_a_damaged_array_fails_one_check(project: Project, values: Values, check: str, grave: bool) -> None:
    tiny(project, cells=CELLS, megabatch_size=64)
    finish(project, values)
    report = report_of(project)
    assert checks(report) == {**GOOD, check: False}
    assert report.verdicts[check].grave == grave


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("same", [True, False])
def test_drift_is_from_the_release_before(good: Project, same: bool) -> None:
    # Other cells of the same types, in another order.
    organism = synthetic_organism("homo_sapiens", "Homo sapiens", CELLS, N_GENES, "ENSG", seed=2, median_genes=40)
    build_census(str(good.folder / "census" / LATER), LATER, [organism])
    report_of(good)
    finish(good, (lambda ids, types: by_type(ids, types, seed=1)) if same else shifted, LATER)
    later = report_of(good, LATER)
    assert checks(later) == {**GOOD, "drift_from_previous_release": same}
    figures = later.verdicts["drift_from_previous_release"].figures
    assert (figures["previous_release"], figures["cell_types"]) == (RELEASE, 6)
    assert RELEASE in later.verdicts["drift_from_previous_release"].text
    # The earlier one is still the first.
    assert "no earlier release" in report_of(good).verdicts["drift_from_previous_release"].text


@pytest.mark.usefixtures("undrawn")
def test_another_model_is_nothing_to_compare_with(good: Project) -> None:
    organism = synthetic_organism("homo_sapiens", "Homo sapiens", CELLS, N_GENES, "ENSG", seed=2, median_genes=40)
    build_census(str(good.folder / "census" / LATER), LATER, [organism])
    report_of(good)
    folder, report = stored(good)
    report["identity"]["checkpoint_fingerprint"] = "another"
    (folder / "report.json").write_text(json.dumps(report))
    finish(good, shifted, LATER)
    verdict = report_of(good, LATER).verdicts["drift_from_previous_release"]
    assert verdict.passed
    assert "no earlier release" in verdict.text
    for damaged in ("", "[]", '{"identity": 3}', '{"identity": {}}'):
        (folder / "report.json").write_text(damaged)
        assert report_of(good, LATER).verdicts["drift_from_previous_release"].passed


def test_an_array_that_is_not_verified_is_not_assessed(project: Project) -> None:
    tiny(project)
    with project.context("tiny") as context:
        make_plan(context)
        with pytest.raises(
            UserError, match="the array is unverified; expected verified: materialize embeddings_array first"
        ):
            assess(context)


def test_a_census_that_tells_little_is_assessed(project: Project) -> None:
    """A few cells, without a type."""
    organism = synthetic_organism("homo_sapiens", "Homo sapiens", 7, N_GENES, "ENSG", seed=1, median_genes=40)
    tiny(project)
    cells = organism.cells.drop(columns=["cell_type", "tissue"])
    small = type(organism)(organism.name, organism.label, organism.counts, organism.genes, cells)
    build_census(str(project.folder / "census" / LATER), LATER, [small])
    finish(project, by_type, LATER)
    report = report_of(project, LATER)
    assert checks(report) == GOOD
    assert set(report.pictures) == PICTURES


KEY = dg.AssetKey(["tiny", "embeddings_array"])


@pytest.fixture
def deployment(good: Project) -> Iterator[Deployment]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield Deployment(good, instance)


def evaluations(deployment: Deployment) -> dict[str, dg.AssetCheckEvaluation]:
    found = {}
    for name in (*GOOD, "same_as_upstream"):
        history = deployment.instance.event_log_storage.get_asset_check_execution_history(
            dg.AssetCheckKey(KEY, name), limit=1
        )
        assert history[0].evaluation is not None
        found[name] = history[0].evaluation
    return found


def test_dagster_shows_pictures_tables_and_checks(deployment: Deployment) -> None:
    assert deployment.run("embeddings_array", RELEASE).success
    (record,) = deployment.instance.fetch_observations(KEY, limit=10).records
    observation = record.asset_observation
    assert observation is not None
    assert observation.partition == RELEASE
    for name in PICTURES:
        value = observation.metadata[title_of(name)]
        assert isinstance(value, dg.MarkdownMetadataValue)
        assert value.value is not None
        assert value.value.startswith(f"![{name}](data:image/png;base64,iVBORw0KGgo")
    table = observation.metadata["Coverage by tissue"]
    assert isinstance(table, dg.TableMetadataValue)
    assert {"tissue_general", "cells", "planned", "embedded", "embedded_share"} == set(table.records[0].data)
    assert sum(row.data["cells"] for row in table.records) == CELLS
    found = evaluations(deployment)
    assert {name: one.passed for name, one in found.items()} == {**GOOD, "same_as_upstream": False}
    assert {one.partition for one in found.values()} == {RELEASE}
    assert found["same_as_upstream"].severity == dg.AssetCheckSeverity.WARN
    assert {one.blocking for one in found.values()} == {False}


def test_what_cannot_be_pictured_is_published_all_the_same(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(context: ReleaseContext, **_: object) -> Report:
        raise MemoryError("too large")

    monkeypatch.setattr(step, "assess", fail)
    result = deployment.run("embeddings_array", RELEASE)
    assert result.success
    assert result.asset_materializations_for_node("tiny__embeddings_array")
    assert deployment.verified()
    for one in evaluations(deployment).values():
        assert (one.passed, one.severity) == (False, dg.AssetCheckSeverity.WARN)
        assert "MemoryError: too large" in (one.description or "")
    assert not deployment.instance.fetch_observations(KEY, limit=10).records


def test_known_assays_are_coloured() -> None:
    assert len(pictures.PALETTE) == len(set(pictures.PALETTE)) == pictures.MOST_GROUPS
    assert len(KNOWN_ASSAYS) < pictures.MOST_GROUPS
