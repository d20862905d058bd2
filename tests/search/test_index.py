"""The index of an array: which cells it holds, what it finds, and what an interrupted or damaged one does."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import anndata
import cellxgene_census.experimental._embedding_search as their_search
import dagster as dg
import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from census_tf_dagster.census.plan import read_plan
from census_tf_dagster.demo.census import Organism
from census_tf_dagster.errors import UserError
from census_tf_dagster.orchestration.checks.index import CELLS_CHECK, RECALL_CHECK
from census_tf_dagster.pipeline import index_array
from census_tf_dagster.pipeline.context import ReleaseContext
from census_tf_dagster.pipeline.finish_array import finish_array
from census_tf_dagster.pipeline.index_array import build_index, index_faults, measured_recall
from census_tf_dagster.search.index import SearchIndex, open_index
from census_tf_dagster.store.array import EmbeddingsArray
from tests.support.builders import tiny
from tests.support.finished import by_type, finish
from tests.support.in_process import Deployment
from tests.support.on_s3 import on_s3
from tests.support.project import RELEASE, REPOSITORY, Project, StoredArray, read_array

pytestmark = pytest.mark.takes(60)

CELLS, K = 900, 5


ZEROS = [3, 4, 500]


def without_counts(organism: Organism) -> None:
    counts = organism.counts.tolil()
    counts[ZEROS] = 0
    object.__setattr__(organism, "counts", counts.tocsr())


def make(project: Project) -> Project:
    tiny(project, cells=CELLS, megabatch_size=64, search_index=True, change=without_counts)
    finish(project, by_type)
    return project


@pytest.fixture
def finished(project: Project) -> Project:
    return make(project)


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, StoredArray]:
    """An index and its array, for tests that change neither."""
    project = make(Project(tmp_path_factory.mktemp("indexed")))
    with project.context("tiny") as context:
        build_index(context)
    return project, read_array(project.array("tiny"), project.folder)


def opened(context: ReleaseContext) -> SearchIndex:
    return SearchIndex.open(context.folder.index, context.store, context.identity.digest)


def folder_of(project: Project) -> Path:
    (folder,) = (project.folder / "store" / "tiny" / RELEASE).glob("*/index")
    return folder


WITH_COUNTS = np.setdiff1d(np.arange(CELLS), ZEROS)


def test_it_holds_each_cell_with_counts_once(indexed: tuple[Project, StoredArray]) -> None:
    project, array = indexed
    with project.context("tiny") as context:
        found = opened(context).joinids()
        assert index_faults(context) == []
    assert len(array.ids) == CELLS
    np.testing.assert_array_equal(found, WITH_COUNTS)


def test_it_finds_what_scikit_learn_finds(indexed: tuple[Project, StoredArray]) -> None:
    project, array = indexed
    there = np.isin(array.ids, WITH_COUNTS)
    ids, values = array.ids[there], array.values[there]
    queries = values[:40] + np.float32(0.01)
    distances, rows = NearestNeighbors(n_neighbors=K).fit(values).kneighbors(queries)
    with project.context("tiny") as context:
        index = opened(context)
        found = index.nearest(queries, K, probes=index.description.partitions)
        assert measured_recall(context) > 0.95
    # What the index holds is rounded to bfloat16.
    np.testing.assert_allclose(found.distances, distances, atol=0.02)
    same = [len(set(mine) & set(theirs)) for mine, theirs in zip(found.joinids, ids[rows], strict=True)]
    assert np.mean(same) > 0.95 * K


def test_a_search_refuses_what_is_no_embedding(indexed: tuple[Project, StoredArray]) -> None:
    project, array = indexed
    with project.context("tiny") as context:
        index = opened(context)
        with pytest.raises(UserError, match=r"shape \(3, 15\); expected \(cells, 16\)"):
            index.nearest(array.values[:3, :15])
        wrong = array.values[:3].copy()
        wrong[1, 4] = np.nan
        with pytest.raises(UserError, match="1 of 3 embeddings are not finite"):
            index.nearest(wrong)
        few = index.nearest(array.values[:2], k=CELLS + 7, probes=10**6)
    assert (few.joinids[:, -7:] == -1).all()
    assert np.isinf(few.distances[:, -7:]).all()


def test_the_library_of_the_census_searches_it(
    indexed: tuple[Project, StoredArray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`find_nearest_obs`, unchanged; only the list of mirrors, which it downloads, is ours."""
    project, array = indexed
    with project.context("tiny") as context:
        index = opened(context)
    base, _, relative = index.uri.partition("store/")
    mirrors = {"default": "here", "here": {"embeddings_base_uri": f"{base}store/", "region": "us-west-2"}}
    monkeypatch.setattr(their_search, "_get_census_mirrors", lambda: mirrors)
    queries = array.values[:20]
    adata = anndata.AnnData(obsm={"tiny": index.projection(queries)}, shape=(20, 0))
    found = their_search.find_nearest_obs(
        "tiny",
        "homo_sapiens",
        RELEASE,
        adata,
        k=K,
        embedding_metadata={
            "embedding_name": "tiny",
            "n_features": index.description.dimensions,
            "indexes": [{"type": "IVFFlat", "relative_uri": relative}],
        },
    )
    ours = index.nearest(queries, K, probes=index.description.partitions)
    np.testing.assert_array_equal(found.neighbor_ids.astype(np.int64), ours.joinids)
    np.testing.assert_allclose(np.sqrt(found.distances), ours.distances, atol=1e-5)


def test_the_python_of_the_page_runs(indexed: tuple[Project, StoredArray]) -> None:
    project, array = indexed
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "search.md").read_text(), re.DOTALL)
    address = re.search(r"store/my_set/\S+/embeddings", blocks[0])
    assert address is not None
    strange = np.full((1, 16), 50, np.float32)
    space = {"embeddings": np.vstack([array.values[:8], strange]), "adata": anndata.AnnData(shape=(9, 0))}
    for block in blocks:
        exec(block.replace(address[0], str(project.array("tiny"))), space)
    assert space["found"].joinids.shape == space["found"].distances.shape == (9, 10)
    assert space["farther_than"][-1] == 1
    assert (space["farther_than"][:8] < 1).all()
    assert space["adata"].obsm["my_embedding"].shape == (9, 16)


def test_an_array_without_an_index_says_what_to_do(finished: Project, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no finished index .* materialize embeddings_index"):
        open_index(str(finished.array("tiny")))
    with pytest.raises(UserError, match="there is no array"):
        open_index(str(tmp_path / "nothing"))


KILLED = """
import os, signal, sys
from pathlib import Path
from census_tf_dagster.pipeline import index_array
from tests.support.project import Project

index_array.BLOCK_CELLS = 256

def say(message):
    if sys.argv[2] in message:
        os.kill(os.getpid(), signal.SIGKILL)

with Project(Path(sys.argv[1])).context("tiny") as context:
    index_array.build_index(context, say)
"""


@pytest.mark.parametrize("message", ["components keep", "projected 512", "clustered", "are read for each cell"])
def test_a_killed_build_goes_on(
    finished: Project, indexed: tuple[Project, StoredArray], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, finished.folder, message], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    monkeypatch.setattr(index_array, "BLOCK_CELLS", 256)
    said: list[str] = []
    with finished.context("tiny") as context:
        with pytest.raises(UserError, match=r"no finished index"):
            opened(context)
        assert index_faults(context)
        build_index(context, said.append)
        assert not any(message in one for one in said if message != "are read for each cell")
        assert index_faults(context) == []
        mine = opened(context)
        assert not (Path(mine.uri).parent / "work").exists()
        again: list[str] = []
        build_index(context, again.append)
        assert again == []
    with indexed[0].context("tiny") as context:
        other = opened(context)
    queries = indexed[1].values[:30]
    np.testing.assert_allclose(
        mine.nearest(queries, K, probes=10**6).distances, other.nearest(queries, K, probes=10**6).distances, rtol=0.02
    )


def test_damage_is_noticed(finished: Project) -> None:
    project = finished
    with project.context("tiny") as context:
        build_index(context)
    folder = folder_of(project)
    files = [one for one in folder.rglob("*") if one.is_file() and one.stat().st_size and one.name != "index.json"]
    assert len(files) > 10
    with project.context("tiny") as context:
        for file in files:
            content = file.read_bytes()
            middle = len(content) // 2
            file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
            assert any(file.name in fault or "damaged" in fault for fault in index_faults(context)), file
            file.write_bytes(content[:-1])
            assert index_faults(context), file
            file.unlink()
            assert index_faults(context), file
            file.write_bytes(content)
        assert index_faults(context) == []
        for content in (b"", b"{}", b"[]", b'{"format": 2}', (folder / "index.json").read_bytes()[:-30]):
            (folder / "index.json").write_bytes(content)
            assert "materialize embeddings_index again" in index_faults(context)[0]


def test_a_changed_array_gets_another_index(finished: Project) -> None:
    with finished.context("tiny") as context:
        build_index(context)
        before = opened(context).description.build
        before_values = read_array(finished.array("tiny"), finished.folder).values
        plan = read_plan(context.store, context.folder.plan)
        array = EmbeddingsArray.open(context.folder.array, context.store, context.identity)
        (ids,) = plan.read_ids(context.store, plan.megabatches[:1])
        array.write(ids, before_values[: len(ids)])
        with pytest.raises(UserError, match="the array is stale"):
            build_index(context)
        finish_array(context)
        assert index_faults(context) == ["it was built from another state of the array"]
        build_index(context)
        after = opened(context).description.build
        assert index_faults(context) == []
    assert before != after
    assert {one.name for one in folder_of(finished).iterdir()} == {"index.json", after}


def test_an_index_of_another_array_is_refused(indexed: tuple[Project, StoredArray]) -> None:
    with indexed[0].context("tiny") as context, pytest.raises(UserError, match="belongs to the array"):
        SearchIndex.open(context.folder.index, context.store, "0" * 64)


def test_equal_cells_may_replace_each_other(project: Project) -> None:
    tiny(project, cells=200, megabatch_size=64, search_index=True)
    finish(project, lambda joinids, _: np.repeat(by_type(joinids[:4], np.full(4, "a")), 50, axis=0))
    with project.context("tiny") as context:
        assert build_index(context).recall == 1.0


def test_the_index_of_a_store_on_s3(project: Project, s3: str) -> None:
    on_s3(project, s3, "indexes")
    make(project)
    with project.context("tiny") as context:
        summary = build_index(context)
        assert summary.uri.startswith("s3://indexes/")
        assert index_faults(context) == []
        index = opened(context)
        assert index.nearest(np.ones((1, 16), np.float32)).joinids.min() >= 0


@pytest.fixture
def deployment(finished: Project) -> Iterator[Deployment]:
    with dg.DagsterInstance.ephemeral(str(finished.folder)) as instance:
        yield Deployment(finished, instance)


def test_the_asset_and_its_checks(deployment: Deployment, finished: Project) -> None:
    result = deployment.run("embeddings_index", RELEASE)
    assert result.success
    (event,) = result.get_asset_materialization_events()
    metadata = {name: value.value for name, value in event.materialization.metadata.items()}
    assert metadata["Recall"] > 0.95
    assert metadata["Cells"] == len(WITH_COUNTS)
    checks = {one.check_name: one for one in result.get_asset_check_evaluations()}
    assert {name: one.passed for name, one in checks.items()} == {CELLS_CHECK: True, RECALL_CHECK: True}
    (vectors,) = folder_of(finished).glob("*/ivf/shuffled_vectors/__fragments/*/a0.tdb")
    vectors.write_bytes(vectors.read_bytes()[:-100])
    keys = {dg.AssetCheckKey(dg.AssetKey(["tiny", "embeddings_index"]), name) for name in (CELLS_CHECK, RECALL_CHECK)}
    # Dagster's job needs an asset beside the checks. The array stays as it is.
    array = {dg.AssetKey(["tiny", "embeddings_array"])}
    only_checks = deployment.job.get_subset(asset_selection=array, asset_check_selection=keys)
    result = only_checks.execute_in_process(partition_key=RELEASE, instance=deployment.instance)
    failed = {one.check_name: one for one in result.get_asset_check_evaluations()}
    assert {name: one.passed for name, one in failed.items()} == {CELLS_CHECK: False, RECALL_CHECK: False}
    assert "a0.tdb has" in str(failed[CELLS_CHECK].description)
    again = deployment.run("embeddings_index", RELEASE)
    assert all(one.passed for one in again.get_asset_check_evaluations())


def test_description_states_what_built_it(indexed: tuple[Project, StoredArray]) -> None:
    stated = json.loads((folder_of(indexed[0]) / "index.json").read_text())
    assert stated["packages"]["tiledb-vector-search"]
    assert len(stated["typical_distances"]) == 101
    assert stated["typical_distances"] == sorted(stated["typical_distances"])
    assert os.fspath(indexed[0].folder) not in json.dumps(stated)
