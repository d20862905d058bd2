"""The demo writes real formats, which their own readers and upstream's own command can read."""

import base64
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import anndata
import cellxgene_census
import cellxgene_census.experimental
import dagster as dg
import numpy as np
import pytest

from census_tf_dagster.config.dagster_names import VERIFIED_CHECK, title_of
from census_tf_dagster.demo.census import Organism, build_census
from census_tf_dagster.demo.synthetic import UNLISTED_ASSAY, organism_from_h5ad, synthetic_organism
from census_tf_dagster.errors import UserError
from census_tf_dagster.orchestration.checks.quality import CHECKS
from census_tf_dagster.orchestration.checks.rules import RULES
from tests.support.project import BOUND, RELEASE, REPOSITORY, SHARED_DATA, UpstreamCommand, read_array, relative_errors

pytestmark = pytest.mark.takes(270)

TRAIN = {"homo_sapiens", "mus_musculus", "callithrix_jacchus"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Make an environment with the package installed from its wheel, outside the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(REPOSITORY)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    install = [*pip, "install", "--no-deps", "--no-compile", "--target", str(folder / "site"), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    env = {**os.environ, "PYTHONPATH": str(folder / "site")}
    env.pop("DAGSTER_HOME", None)
    where = [sys.executable, "-c", "import census_tf_dagster; print(census_tf_dagster.__file__)"]
    found = subprocess.run(where, env=env, cwd=folder, capture_output=True, text=True, check=True).stdout
    assert found.startswith(str(folder / "site"))
    return env


@pytest.fixture(scope="module")
def demo(installed: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the whole demo by its command, with the installed package."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "census_tf_dagster", "demo"]
    done = subprocess.run(command, cwd=folder, env=installed, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "output").write_text(done.stdout)
    return folder


def test_the_report_says_what_came_out_and_what_it_is_worth(demo: Path) -> None:
    report = (demo / "output").read_text()
    assert "mean nothing biologically" in report
    for name, cells in (("demo_human", 400), ("demo_mouse", 300), ("demo_marmoset", 100)):
        (array,) = (demo / "demo-data" / "store" / name / RELEASE).glob("*/embeddings")
        assert f"{name:<15} {cells:>6} {64:>9}" in report
        assert str(array) in report
        stored = read_array(array, demo)
        assert np.array_equal(stored.ids, np.arange(cells))
        assert stored.stored_values == cells * 64


def test_the_demo_publishes_its_human_cells(demo: Path) -> None:
    (array,) = (demo / "demo-data" / "store" / "demo_human" / RELEASE).glob("*/embeddings")
    info = cellxgene_census.experimental.get_embedding_metadata(str(array))
    assert (info["embedding_name"], info["census_version"], info["n_features"]) == ("demo_human", RELEASE, 64)
    assert (array.parent / "meta.yml").exists()


def test_the_demo_shows_what_its_embeddings_are_worth(demo: Path) -> None:
    """After the demo, Dagster's event log has pictures, coverage, and checks of array and shards."""
    (folder,) = (demo / "demo-data" / "store" / "demo_human" / RELEASE).glob("*/qc")
    array, shards = (dg.AssetKey(["demo_human", name]) for name in ("embeddings_array", "shard_embeddings"))
    with dg.DagsterInstance.from_config(str(demo / "demo-data" / "dagster_home")) as instance:
        assert not instance.nux_enabled, "no newsletter over the first page"
        # On a slow machine, shards that ran for more than half a minute have also recorded the release's progress.
        observed = [record.asset_observation for record in instance.fetch_observations(array, limit=100).records]
        (shown,) = [one.metadata for one in observed if one is not None and "Coverage by tissue" in one.metadata]
        for picture in folder.glob("*.png"):
            encoded = base64.b64encode(picture.read_bytes()).decode()
            assert shown[title_of(picture.stem)].value == f"![{picture.stem}](data:image/png;base64,{encoded})"
        table = shown["Coverage by tissue"]
        assert isinstance(table, dg.TableMetadataValue)
        tissues = table.records
        assert sum(row.data["embedded"] for row in tissues) == sum(row.data["cells"] for row in tissues) == 400
        log = instance.event_log_storage
        passed = {}
        for key in [dg.AssetCheckKey(array, name) for name in (*CHECKS, *RULES, VERIFIED_CHECK)]:
            (evaluated,) = log.get_asset_check_execution_history(key, limit=10)
            assert evaluated.evaluation is not None
            passed[key.name] = evaluated.evaluation.passed
        # Upstream is not installed beside the demo's Python; no check warns of that, as nobody can act on it.
        assert {name for name, one in passed.items() if not one} == set()
        checked = log.get_asset_check_execution_history(dg.AssetCheckKey(shards, "same_as_upstream"), limit=10)
        assert sorted(one.evaluation.partition for one in checked if one.evaluation) == [
            f"{RELEASE}|{shard}" for shard in range(4)
        ]


def test_the_page_for_readers_runs(demo: Path) -> None:
    page = (REPOSITORY / "docs" / "read.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL))
    (array,) = (demo / "demo-data" / "store" / "demo_human" / RELEASE).glob("*/embeddings")
    for name, value in (("array_uri", array), ("census_uri", demo / "demo-data" / "census" / RELEASE)):
        code, replaced = re.subn(f'{name} = ".*"', f'{name} = "{value}"', code)
        assert replaced == 1
    code += "\nassert len(adata) == len(joinids) == len(embeddings) == len(centred) > 100 and verified and made_with"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_notebook_with_own_cells_runs(demo: Path, installed: dict[str, str]) -> None:
    """So does the code of its page, on the file that the notebook leaves."""
    notebook = json.loads((REPOSITORY / "docs" / "own_cells.ipynb").read_text())
    code = "\n".join("".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code")
    page = (REPOSITORY / "docs" / "embed.md").read_text()
    block, *_ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    block, replaced = re.subn("own_file, checkpoint = .*", "", block)
    assert replaced == 1
    code += f"\nalike = embeddings\n{block}\nassert np.isfinite(embeddings).all() and embeddings.shape == alike.shape"
    env = {**installed, "MPLBACKEND": "agg", "CENSUS_TF_CACHE": str(demo / "cache")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=demo, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "(150, 64) float32\n(400, 64)\nthe nearest Census cell" in done.stdout
    assert (demo / "demo-data" / "own_cells.png").stat().st_size > 10_000


def test_a_second_demo_says_what_to_do(demo: Path) -> None:
    again = subprocess.run(
        [sys.executable, "-m", "census_tf_dagster", "demo"], cwd=demo, capture_output=True, text=True
    )
    assert again.returncode == 1
    assert "exists already" in again.stderr


def test_census_as_its_own_package_reads_it(demo: Path) -> None:
    with cellxgene_census.open_soma(uri=str(demo / "demo-data" / "census" / RELEASE)) as census:
        assert set(census["census_data"].keys()) == TRAIN
        assert {"summary", "datasets", "summary_cell_counts"} <= set(census["census_info"].keys())
        obs = cellxgene_census.get_obs(census, "homo_sapiens")
        assert {"observation_joinid", "dataset_version_id", "dataset_id", "assay", "nnz"} <= set(obs.columns)
        assert 1400 < obs.nnz.median() < 2200
        tissue = obs.tissue_general.iloc[0]
        part = cellxgene_census.get_obs(census, "homo_sapiens", value_filter=f"tissue_general == '{tissue}'")
        assert len(part) == (obs.tissue_general == tissue).sum()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adata = cellxgene_census.get_anndata(census, "Homo sapiens", obs_coords=slice(0, 9))
        assert adata.shape == (10, 20_000)
        assert np.array_equal(np.diff(adata.X.indptr), obs.nnz.to_numpy()[:10])
        presence = cellxgene_census.get_presence_matrix(census, "Homo sapiens")
        assert presence.shape[1] == 20_000


@pytest.mark.upstream
@pytest.mark.parametrize("organism", ["homo_sapiens", "callithrix_jacchus"])
def test_demo_values_are_upstreams(demo: Path, upstream_command: UpstreamCommand, organism: str) -> None:
    """With the default storage precision, values are upstream's to within half a bfloat16 step."""
    data = demo / "demo-data"
    with (
        cellxgene_census.open_soma(uri=str(data / "census" / RELEASE)) as census,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        # Upstream computes the whole window of each cell, so a few cells are enough.
        unlisted = np.flatnonzero(cellxgene_census.get_obs(census, organism).assay == UNLISTED_ASSAY)
        chosen = np.union1d(np.arange(5), unlisted[:1])
        adata: anndata.AnnData = cellxgene_census.get_anndata(census, organism, obs_coords=chosen.tolist())
        adata.var["ensembl_id"] = adata.var["feature_id"].to_numpy()
        assert UNLISTED_ASSAY in set(adata.obs.assay)
    embedding_file = data / "embeddings" / f"{organism}_gene.h5"
    pretrained = embedding_file if embedding_file.exists() else None
    reference = upstream_command.embed(data / "checkpoint", adata, pretrained)
    name = {"homo_sapiens": "demo_human", "callithrix_jacchus": "demo_marmoset"}[organism]
    (array,) = (data / "store" / name / RELEASE).glob("*/embeddings")
    stored = read_array(array, demo).values[chosen]
    assert np.max(np.abs(stored - reference) / np.abs(reference)) <= 2**-7
    assert np.mean(np.abs(stored - reference) <= np.abs(reference) * (2**-8 + BOUND)) > 0.997
    assert relative_errors(stored, reference).max() < 2**-8


def test_census_from_a_users_file(tmp_path: Path) -> None:
    file = SHARED_DATA / "mouse_merfish_500.h5ad"
    if not file.exists():
        pytest.skip("the file is not here")
    build_census(str(tmp_path / "c"), RELEASE, [organism_from_h5ad(file, "mus_musculus", "Mus musculus")])
    original = anndata.read_h5ad(file)
    with cellxgene_census.open_soma(uri=str(tmp_path / "c")) as census, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata = cellxgene_census.get_anndata(census, "Mus musculus")
    assert np.array_equal(adata.X.toarray(), original.X.toarray())
    assert adata.var["feature_id"].tolist() == original.var["ensembl_id"].tolist()
    assert adata.obs["observation_joinid"].tolist() == original.obs["observation_joinid"].tolist()


@pytest.mark.parametrize("column", ["feature_id", "ensembl_id", "gene_ids", "gene_id"])
def test_gene_ids_are_found_where_embed_finds_them(tmp_path: Path, column: str) -> None:
    """So the demo's checkpoint knows the genes of any file that `embed` takes."""
    adata = anndata.AnnData(np.ones((2, 2), np.float32))
    adata.var_names = ["symbol-0", "symbol-1"]
    adata.var[column] = ["ENSG00000000001.3", "ENSG00000000002.11"]
    adata.write_h5ad(tmp_path / "x.h5ad")
    organism = organism_from_h5ad(tmp_path / "x.h5ad", "homo_sapiens", "Homo sapiens")
    assert organism.genes["feature_id"].tolist() == ["ENSG00000000001", "ENSG00000000002"]


def test_a_file_of_no_counts_is_refused(tmp_path: Path) -> None:
    adata = anndata.AnnData(np.full((2, 2), 0.5, np.float32))
    adata.var["ensembl_id"] = ["ENSG00000000001", "ENSG00000000002"]
    adata.write_h5ad(tmp_path / "x.h5ad")
    with pytest.raises(UserError, match=r"x\.h5ad.*0\.5"):
        organism_from_h5ad(tmp_path / "x.h5ad", "homo_sapiens", "Homo sapiens")


def test_the_data_alone_come_with_an_instance(tmp_path: Path) -> None:
    """The page on own cells copies its dagster.yaml."""
    command = [sys.executable, "-m", "census_tf_dagster", "demo", "--data-only"]
    env = {**os.environ, "DAGSTER_HOME": str(tmp_path / "another")}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "max_concurrent_runs: 1" in (tmp_path / "demo-data" / "dagster_home" / "dagster.yaml").read_text()


@pytest.mark.parametrize("argument", ["homo_sapiens", "danio_rerio=x.h5ad", "homo_sapiens=missing.h5ad"])
def test_wrong_h5ad_arguments(tmp_path: Path, argument: str) -> None:
    command = [sys.executable, "-m", "census_tf_dagster", "demo", "--h5ad", argument]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: --h5ad is '{argument}'")
    assert not (tmp_path / "demo-data").exists()


def test_synthetic_organisms_are_reproducible() -> None:
    first, second = (synthetic_organism("x_y", "X y", 20, 500, "ENSG", seed=3, median_genes=90) for _ in range(2))
    assert isinstance(first, Organism)
    assert (first.counts != second.counts).nnz == 0
