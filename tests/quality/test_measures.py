"""Samples, coverage and figures equal values that are computed in another way."""

import itertools
import pickle
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from sklearn.neighbors import NearestNeighbors

from census_tf_dagster.io.storage import Storage
from census_tf_dagster.quality import measures, sample, verdicts
from census_tf_dagster.quality.coverage import JoinidSet, _encoded
from census_tf_dagster.quality.measures import Distribution
from census_tf_dagster.quality.projection import project
from census_tf_dagster.quality.upstream_comparison import NOT_INSTALLED, UpstreamComparison


def test_a_sample_is_the_same_every_time_and_in_runs_that_lie_in_one_tile() -> None:
    cells = np.random.default_rng(1).integers(1, 16_385, size=3000)
    first, second = (sample.sampled_positions(cells) for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    sizes = [len(one) for one in first]
    assert 0.99 * sample.SAMPLE_CELLS <= sum(sizes) <= sample.SAMPLE_CELLS
    for positions, count in zip(first, cells, strict=True):
        assert (np.diff(positions) > 0).all()
        assert not len(positions) or positions[-1] < count
        runs, lengths = np.unique(positions // sample.RUN, return_counts=True)
        assert all(
            length == sample.RUN or run == (count - 1) // sample.RUN for run, length in zip(runs, lengths, strict=True)
        )
    # The sample covers the whole plan: every tenth of it has a cell.
    tenths = [sum(sizes[i : i + 300]) for i in range(0, 3000, 300)]
    assert min(tenths) > sample.SAMPLE_CELLS / 20


def test_a_small_plan_is_sampled_whole() -> None:
    positions = sample.sampled_positions(np.array([3, 1, 5]))
    assert [one.tolist() for one in positions] == [[0, 1, 2], [0], [0, 1, 2, 3, 4]]


def test_a_set_of_joinids_holds_what_was_added() -> None:
    rng = np.random.default_rng(0)
    chosen = np.unique(rng.integers(10_001, size=3000))
    found = JoinidSet()
    for part in np.array_split(chosen, 7):
        found.add(part)
    assert np.array_equal(np.flatnonzero(found.holds(np.arange(10_001))), chosen)


def test_columns_are_encoded_whatever_their_chunks_and_dictionaries() -> None:
    chunks = [["b", "a", None], ["c", "a"]]
    for column in (
        pa.chunked_array([pa.array(chunk) for chunk in chunks]),
        pa.chunked_array([pa.array(chunk).dictionary_encode() for chunk in chunks]),
    ):
        names, codes = _encoded(column)
        assert [names[code] for code in codes] == ["b", "a", "(none)", "c", "a"]


def test_neighbours_are_those_of_the_largest_centred_cosine() -> None:
    embeddings = np.random.default_rng(0).normal(3, 1, size=(1200, 20)).astype(np.float32)
    found = measures.find_neighbours(embeddings)
    reference = NearestNeighbors(n_neighbors=16, metric="cosine").fit(embeddings - embeddings.mean(axis=0))
    distances, indices = reference.kneighbors()
    assert np.allclose(found.distances, distances[:, :15], atol=1e-5)
    assert np.mean(found.indices == indices[:, :15]) > 0.999


def clustered(cells: int, kinds: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    kind = rng.integers(kinds, size=cells)
    centres = np.random.default_rng(99).normal(size=(kinds, 32))
    values = 5 + centres[kind] + noise * rng.normal(size=(cells, 32))
    return values.astype(np.float32), np.array([f"type {i}" for i in kind])


def agreement(embeddings: np.ndarray, labels: np.ndarray, datasets: np.ndarray | None = None) -> measures.Agreement:
    datasets = np.full(len(labels), "one") if datasets is None else datasets
    return measures.label_agreement(measures.find_neighbours(embeddings), labels, datasets)


def test_neighbours_share_a_type_where_types_lie_together() -> None:
    embeddings, labels = clustered(800, 8, noise=0.5)
    found = agreement(embeddings, labels)
    assert found.share > 0.95
    assert found.baseline == pytest.approx(sum((labels == name).mean() ** 2 for name in np.unique(labels)), abs=0.01)
    assert verdicts.of_neighbours(found).passed
    # These are the same cells, each with the embedding of another one.
    shuffled = agreement(np.random.default_rng(1).permutation(embeddings), labels)
    assert abs(shuffled.share - shuffled.baseline) < 0.02
    verdict = verdicts.of_neighbours(shuffled)
    assert not verdict.passed
    assert not verdict.grave


def test_what_a_dataset_brings_by_itself_counts_nothing() -> None:
    """Two separate datasets have different shares of types; within each, embeddings do not depend on the type."""
    rng = np.random.default_rng(0)
    dataset = np.repeat([0, 1], 400)
    embeddings = (10 * dataset[:, None] + rng.normal(size=(800, 32))).astype(np.float32)
    labels = np.where(rng.random(800) < np.where(dataset, 0.9, 0.1), "a", "b")
    assert not verdicts.of_neighbours(agreement(embeddings, labels, dataset.astype(str))).passed
    assert verdicts.of_neighbours(agreement(embeddings, labels)).passed


def test_without_types_there_is_nothing_to_compare() -> None:
    embeddings, labels = clustered(400, 4, noise=0.5)
    for these in (np.full(400, "unknown"), np.full(400, "neuron"), np.where(np.arange(400) < 150, labels, "unknown")):
        verdict = verdicts.of_neighbours(agreement(embeddings, these))
        assert verdict.passed
        assert verdict.text.startswith("Nothing to compare")


def test_collapsed_dimensions_are_found() -> None:
    embeddings, _ = clustered(300, 4, noise=1.0)
    assert verdicts.of_dimensions(measures.look_at_dimensions(embeddings)).passed
    embeddings[:, 7] = 1.25
    embeddings[:, 9] = 1 + 1e-5 * embeddings[:, 9]
    found = measures.look_at_dimensions(embeddings)
    assert (found.constant, found.collapsed) == ((7,), (7, 9))
    verdict = verdicts.of_dimensions(found)
    assert (verdict.passed, verdict.grave) == (False, True)
    assert "7, 9" in verdict.text
    embeddings[:, 7] = embeddings[:, 6]
    verdict = verdicts.of_dimensions(measures.look_at_dimensions(embeddings))
    assert (verdict.passed, verdict.grave) == (False, False)


def test_one_point_for_all_cells_is_a_collapse() -> None:
    verdict = verdicts.of_dimensions(measures.look_at_dimensions(np.ones((50, 8), np.float32)))
    assert (verdict.passed, verdict.figures["constant"]) == (False, 8)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_effective_rank_is_that_of_equal_dimensions(rank: int) -> None:
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(32, 32)))[0][:rank]
    embeddings = np.random.default_rng(1).normal(size=(20_000, rank)) @ basis
    assert measures.look_at_dimensions(embeddings.astype(np.float32)).effective_rank == pytest.approx(rank, rel=0.02)


def test_drift_tells_other_cells_of_a_type_from_another_place() -> None:
    before, same = (Distribution.of(*clustered(2000, 6, 0.7, seed)) for seed in (1, 2))
    values, labels = clustered(2000, 6, 0.7, seed=3)
    nothing = measures.drift(same, before)
    assert nothing is not None
    assert nothing.types == 6
    assert nothing.shift < 0.05
    assert verdicts.of_drift(nothing, "r1").passed
    moved = measures.drift(Distribution.of(values + np.float32(0.7), labels), before)
    assert moved is not None
    assert moved.shift == pytest.approx(1.0, rel=0.1)
    assert not verdicts.of_drift(moved, "r1").passed
    wide = measures.drift(Distribution.of((5 + 2 * (values - 5)).astype(np.float32), labels), before)
    assert wide is not None
    assert wide.spread == pytest.approx(1.0, rel=0.1)
    assert not verdicts.of_drift(wide, "r1").passed
    strangers = Distribution.of(values, np.char.replace(labels, "type", "other"))
    assert measures.drift(strangers, before) is None
    assert verdicts.of_drift(None, "r1").passed


def test_a_distribution_is_read_back_and_nothing_is_unpickled() -> None:
    found = Distribution.of(*clustered(500, 3, 0.7))
    read = Distribution.from_bytes(found.to_bytes())
    assert read.types == found.types
    assert np.array_equal(read.means, found.means)
    assert np.array_equal(read.cells, found.cells)
    sink = BytesIO()
    np.savez(sink, types=np.array([found], object), cells=found.cells, means=found.means, deviations=found.deviations)
    for content in (sink.getvalue(), pickle.dumps(found), b"", found.to_bytes()[:100]):
        with pytest.raises(ValueError, match=r"distribution|pickle"):
            Distribution.from_bytes(content)


def test_types_of_few_cells_are_no_evidence() -> None:
    values, labels = clustered(60, 2, 0.7)
    assert Distribution.of(values, labels).types == ()
    assert Distribution.of(values, np.full(60, "unknown")).types == ()


def test_a_picture_of_the_plane_is_the_same_every_time_and_keeps_neighbours() -> None:
    embeddings, labels = clustered(300, 5, noise=0.3)
    neighbours = measures.find_neighbours(embeddings)
    first, second = (project(embeddings, neighbours) for _ in range(2))
    assert np.array_equal(first, second)
    # A later process does not compile for ten seconds.
    import umap

    assert umap.umap_.smooth_knn_dist.stats.cache_path
    near = NearestNeighbors(n_neighbors=5).fit(first).kneighbors(return_distance=False)
    assert np.mean(labels[near] == labels[:, None]) > 0.95


def comparison(shard: int, worst: float = 0.0, not_done: str = "") -> UpstreamComparison:
    return UpstreamComparison(shard, (1, 2), bound=1e-3, worst_cell=worst, not_done=not_done)


def test_a_release_agrees_with_upstream_when_each_shard_does() -> None:
    good, wrong, absent = comparison(0, 1e-4), comparison(1, 1e-2), comparison(2, not_done="no upstream here")
    assert verdicts.of_comparisons([good, comparison(1, 1e-4)]).passed
    for others, grave in (([wrong], True), ([wrong, absent], True), ([absent], False), ([None], False)):
        verdict = verdicts.of_comparisons([good, *others])
        assert (verdict.passed, verdict.grave) == (False, grave)
    assert "no upstream here" in verdicts.of_comparisons([good, absent]).text
    assert verdicts.of_comparison(good).passed
    assert (verdicts.of_comparison(wrong).passed, verdicts.of_comparison(wrong).grave) == (False, True)
    assert (verdicts.of_comparison(absent).passed, verdicts.of_comparison(absent).grave) == (False, False)
    lacking = comparison(3, not_done=NOT_INSTALLED)
    assert not verdicts.of_comparison(lacking).passed
    assert verdicts.of_comparison(lacking, may_lack_upstream=True).passed
    assert not verdicts.of_comparison(absent, may_lack_upstream=True).passed
    for others, passed in (([], True), ([good], True), ([absent], False), ([wrong], False), ([None], False)):
        assert verdicts.of_comparisons([lacking, *others], may_lack_upstream=True).passed is passed
    assert not verdicts.of_comparisons([lacking, good]).passed
    assert verdicts.of_comparison(good).compared
    assert verdicts.of_comparisons([lacking, good]).compared
    for verdict in (
        verdicts.of_comparison(lacking, may_lack_upstream=True),
        verdicts.of_comparisons([lacking], may_lack_upstream=True),
        verdicts.of_drift(None, None),
        verdicts.of_neighbours(None),
    ):
        assert (verdict.passed, verdict.compared) == (True, False)


def test_a_comparison_is_read_back_and_anything_else_is_none(tmp_path: Path) -> None:
    storage, uri = Storage(), f"{tmp_path}/one.json"
    assert UpstreamComparison.read(storage, uri) is None
    comparison(3, 0.5).write(storage, uri)
    assert UpstreamComparison.read(storage, uri) == comparison(3, 0.5)
    for content in (b"", b"[]", b"{}", b'{"shard": 1}'):
        storage.write(uri, content)
        assert UpstreamComparison.read(storage, uri) is None


def test_a_comparison_compares_cell_by_cell() -> None:
    upstreams = np.random.default_rng(0).normal(4, 1, size=(6, 16)).astype(np.float32)
    ours = upstreams.copy()
    ours[2] *= 1.01
    found = UpstreamComparison.compare(0, np.arange(6), ours, upstreams, 1e-3, 1.0)
    assert found.worst_cell == pytest.approx(0.01, rel=1e-3)
    for order in itertools.islice(itertools.permutations(range(6)), 1, 4):
        assert not verdicts.of_comparison(
            UpstreamComparison.compare(0, np.arange(6), upstreams[list(order)], upstreams, 1e-2, 1.0)
        ).passed
