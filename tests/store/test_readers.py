"""Readers that docs/read.md names, older than this project's own, on a Census and an array that were made here.

Each has an environment of its own, which the first run makes below pytest's cache (`.pytest_cache/d`).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from census_tf_dagster.demo.census import Organism
from census_tf_dagster.pipeline.finish_array import finish_array
from tests.support.builders import PUBLICATION, fill, tiny, value_of
from tests.support.environments import environment
from tests.support.project import Project
from tests.support.read_page import reader

pytestmark = pytest.mark.soak

CURATORS = ["tiledbsoma==1.15.3", "tiledb==0.33.4", "cellxgene-census==1.17.0", "attrs", "cattrs>=23.2.2", "psutil"]
CURATORS += ["pyyaml", "requests", "typed-argument-parser", "typing_extensions", "scanpy"]
"""What `tools/census_contrib` of the repository chanzuckerberg/cellxgene-census asks for."""

FILTERS = (
    "is_primary_data == True",
    "disease == 'COVID-19'",
    "cell_type in ['T cell', 'neuron'] and nnz > 40",
    "tissue_general != 'spleen'",
    "assay not in ['Smart-seq2'] or sex == 'male'",
)

FILTERING = """
import json, sys
found = {}
with tiledbsoma.open(census_uri) as census:
    obs = census["census_data"]["homo_sapiens"].obs
    for value_filter in json.loads(sys.argv[1]):
        table = obs.read(value_filter=value_filter, column_names=["soma_joinid", "cell_type"]).concat()
        found[value_filter] = [table["soma_joinid"].to_pylist(), table["cell_type"].to_pylist()]
    var = census["census_data"]["homo_sapiens"].ms["RNA"].var.read().concat()
    found["genes"] = var["feature_id"].to_pylist()
with tiledbsoma.open(array_uri, context=context) as array:
    joinids, embeddings = embeddings_of(array, np.arange(150))
found["embeddings"] = [joinids.tolist(), embeddings.tolist()]
print(json.dumps([tiledbsoma.__version__, found]))
"""


def some_spleen(organism: Organism) -> None:
    """Set the tissue of every second cell to spleen, because the curators' tool draws cells of the spleen."""
    organism.cells["tissue"] = np.where(np.arange(len(organism.cells)) % 2, "spleen", "lung")


@pytest.fixture
def finished(project: Project) -> Project:
    tiny(project, change=some_spleen, publication=PUBLICATION)
    with project.context("tiny") as context:
        fill(context)
        finish_array(context)
    return project


@pytest.mark.parametrize("version", ["1.15.3", "1.17.1"])
def test_older_readers_read_and_filter(finished: Project, request: pytest.FixtureRequest, version: str) -> None:
    older = environment(request.config.cache, f"tiledbsoma-{version}", [f"tiledbsoma=={version}"])
    paths = f"\ncensus_uri, array_uri = {str(finished.census)!r}, {str(finished.array('tiny'))!r}\n"
    found = []
    for python in (str(older), sys.executable):
        command = [python, "-W", "ignore", "-c", reader() + paths + FILTERING, json.dumps(FILTERS)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(done.stdout))
    (its_version, its), (_, ours) = found
    assert its_version == version
    assert its == ours
    assert all(0 < len(ours[value_filter][0]) < 200 for value_filter in FILTERS)
    assert np.array_equal(its["embeddings"][1], value_of(np.arange(150), 16))


def test_the_curators_tool_validates_and_draws(finished: Project, request: pytest.FixtureRequest) -> None:
    """It is in no package registry: CENSUS_CONTRIB names `tools/census_contrib` of a checkout."""
    checkout = os.environ.get("CENSUS_CONTRIB", "")
    if not (Path(checkout) / "src" / "census_contrib").is_dir():
        pytest.skip("needs CENSUS_CONTRIB=.../cellxgene-census/tools/census_contrib")
    python = environment(request.config.cache, "census-contrib", CURATORS)
    array = finished.array("tiny")
    work = finished.folder / "work"
    work.mkdir()
    (work / PUBLICATION["id"]).symlink_to(array)
    (work / "meta.yml").write_bytes((array.parent / "meta.yml").read_bytes())
    command = [str(python), "-m", "census_contrib", "validate", "--cwd", str(work)]
    command += ["--census-uri", str(finished.census)]
    env = {**os.environ, "PYTHONPATH": str(Path(checkout) / "src")}
    done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    drawn = sorted(path.name for path in (work / "figures").iterdir())
    assert drawn == [f"umap_spleen_{column}.png" for column in ("assay", "cell_type", "dataset_id")]
