"""A broken rule of a finished array is always found; a published set has the right metadata."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cellxgene_census.experimental
import dagster as dg
import numpy as np
import pyarrow as pa
import pytest
import tiledbsoma
import yaml
from pydantic import ValidationError

from census_tf_dagster.census.release import OrganismRelease
from census_tf_dagster.config.publication import INFO_KEY, Publication
from census_tf_dagster.definitions import build_definitions, load_sets
from census_tf_dagster.errors import UserError
from census_tf_dagster.operate.dry_run import describe, dry_run
from census_tf_dagster.orchestration.resources import CensusResource, StoreResource
from census_tf_dagster.pipeline.context import ReleaseContext
from census_tf_dagster.pipeline.finish_array import RuleError, array_state, finish_array, verify_array
from census_tf_dagster.pipeline.plan_release import make_plan
from census_tf_dagster.store.array import EmbeddingsArray
from tests.support.builders import PUBLICATION, fill, tiny
from tests.support.project import RELEASE, Project

pytestmark = pytest.mark.takes(75)

RULES = ["schema", "shape", "storage_version", "cells", "features", "values", "publication", "obs_ids"]


@pytest.fixture
def finished(project: Project) -> Iterator[ReleaseContext]:
    """Make a published array of every second cell, 100 of 200."""
    tiny(project, mod=2, publication=PUBLICATION)
    with project.context("tiny") as context:
        fill(context)
        finish_array(context)
        yield context


def broken(context: ReleaseContext) -> dict[str, tuple[str, ...]]:
    """Return the faults of each broken rule."""
    try:
        findings = verify_array(context)
    except RuleError as error:
        findings = error.findings
    return {finding.rule: finding.wrong for finding in findings if finding.wrong}


def opened(context: ReleaseContext) -> EmbeddingsArray:
    return EmbeddingsArray.open(context.folder.array, context.store, context.identity)


def put(context: ReleaseContext, joinids: list[int], features: list[int], values: list[float]) -> None:
    """Commit values as any program could, without this project's checks."""
    table = pa.table(
        {
            "soma_dim_0": pa.array(joinids, pa.int64()),
            "soma_dim_1": pa.array(features, pa.int64()),
            "soma_data": pa.array(values, pa.float32()),
        }
    )
    with tiledbsoma.open(context.folder.array, "w") as array:
        array.write(table)


def lose(context: ReleaseContext, joinid: int) -> tuple[int, int]:
    """Remove the fragment that holds a cell; return its range."""
    (one,) = [found for found in opened(context).fragments() if found.first <= joinid <= found.last]
    folder = Path(context.folder.array)
    shutil.rmtree(folder / "__fragments" / one.name)
    (folder / "__commits" / f"{one.name}.wrt").unlink()
    return one.first, one.last


def infinite(context: ReleaseContext) -> None:
    put(context, [4, 8], [3, 0], [np.nan, np.inf])


def zero(context: ReleaseContext) -> None:
    put(context, [4] * 16, list(range(16)), [0.0] * 16)


def many_infinite(context: ReleaseContext) -> None:
    put(context, list(range(0, 60, 2)), [0] * 30, [np.nan] * 30)


def unplanned(context: ReleaseContext) -> None:
    put(context, [7] * 16 + [199], [*range(16), 0], [1.0] * 17)


def missing(context: ReleaseContext) -> None:
    lose(context, 50)


def incomplete(context: ReleaseContext) -> None:
    first, last = lose(context, 50)
    ids = np.arange(first, last + 1, 2)
    features = np.tile(np.arange(16), len(ids))
    kept = features != 5
    put(context, np.repeat(ids, 16)[kept].tolist(), features[kept].tolist(), [1.0] * int(kept.sum()))


def beyond(context: ReleaseContext) -> None:
    with tiledbsoma.open(context.folder.array, "w") as array:
        array.resize((200, 17))
    put(context, [6], [16], [1.0])


def longer(context: ReleaseContext) -> None:
    with tiledbsoma.open(context.folder.array, "w") as array:
        array.resize((201, 16))


DAMAGES: list[tuple[Callable[[ReleaseContext], None], dict[str, str]]] = [
    (infinite, {"values": "2 cells have values that are not finite, joinids [4, 8]"}),
    (zero, {"values": "1 cells have only zeros, which cannot be, because START is always pooled, joinids [4]"}),
    (many_infinite, {"values": f"30 cells have values that are not finite, joinids {list(range(0, 20, 2))}"}),
    (unplanned, {"cells": "2 cells are in the array but not planned, joinids [7, 199]"}),
    (missing, {"cells": "planned cells are missing, joinids ["}),
    (incomplete, {"features": "planned cells lack some of their values, joinids ["}),
    (
        beyond,
        {"features": "1 cells hold features beyond the last, joinids [6]", "shape": "(200, 17); expected (200, 16)"},
    ),
    (longer, {"shape": "the shape is (201, 16); expected (200, 16)"}),
]


@pytest.mark.parametrize(("damage", "expected"), DAMAGES, ids=lambda value: getattr(value, "__name__", ""))
def test_damage_is_found_and_named(
    finished: ReleaseContext, damage: Callable[[ReleaseContext], None], expected: dict[str, str]
) -> None:
    assert broken(finished) == {}
    damage(finished)
    found = broken(finished)
    assert found.keys() == expected.keys()
    for rule, text in expected.items():
        assert text in found[rule][0]
    record = opened(finished).read_record()
    with pytest.raises(RuleError):
        finish_array(finished)
    assert opened(finished).read_record() == record


def test_files_that_were_replaced_under_the_same_names_are_found(finished: ReleaseContext) -> None:
    """Such values change nothing in TileDB's description of its fragments except their sizes."""
    good = opened(finished).fragments()[2]
    ids = np.arange(good.first, good.last + 1, 2)
    put(finished, np.repeat(ids, 16).tolist(), list(range(16)) * len(ids), [np.nan] * len(ids) * 16)
    (bad,) = [one for one in opened(finished).fragments() if one.first == good.first and one.name != good.name]
    fragments, commits = (Path(finished.folder.array) / name for name in ("__fragments", "__commits"))
    shutil.rmtree(fragments / good.name)
    (fragments / bad.name).rename(fragments / good.name)
    (commits / f"{bad.name}.wrt").unlink()
    # The consolidated metadata of fragments still has the old file sizes.
    shutil.rmtree(Path(finished.folder.array) / "__fragment_meta")
    found = broken(finished)
    assert found.keys() == {"values"}
    assert f"{len(ids)} cells have values that are not finite, joinids {ids[:10].tolist()}" in found["values"][0]


def replace_array(context: ReleaseContext, **options: Any) -> None:
    """Replace the array by another one with the same metadata."""
    with tiledbsoma.open(context.folder.array) as array:
        metadata = {key: value for key, value in array.metadata.items() if not key.startswith("soma_")}
        table = array.read().tables().concat()
    shutil.rmtree(context.folder.array)
    kind = options.pop("kind", tiledbsoma.SparseNDArray)
    with kind.create(context.folder.array, **{"type": pa.float32(), "shape": (200, 16), **options}) as array:
        array.metadata.update(metadata)
    if options.keys() == {"platform_config"}:
        for _ in range(2):
            with tiledbsoma.open(context.folder.array, "w") as array:
                array.write(table)


SCHEMAS = [
    ({"type": pa.float64()}, "soma_data is double; expected float"),
    ({"shape": (200, 16, 2)}, "soma_dim_2 is int64; expected no such column"),
    ({"shape": (200,)}, "soma_dim_1 is absent; expected int64"),
    ({"kind": tiledbsoma.DenseNDArray}, "it is a DenseNDArray; expected a SparseNDArray"),
]


@pytest.mark.parametrize(("options", "text"), SCHEMAS, ids=["float64", "3-D", "1-D", "dense"])
def test_another_schema_is_found(finished: ReleaseContext, options: dict[str, Any], text: str) -> None:
    replace_array(finished, **options)
    found = broken(finished)
    assert found.keys() == {"schema"}
    assert text in "; ".join(found["schema"])


def test_coordinates_that_are_there_twice_are_found(finished: ReleaseContext) -> None:
    replace_array(finished, platform_config=tiledbsoma.TileDBCreateOptions(allows_duplicates=True))
    found = broken(finished)
    assert found.keys() == {"schema", "features"}
    assert "it allows duplicates" in found["schema"][0]
    assert "100 cells hold a feature more than once, joinids [0, 2, 4" in found["features"][0]


def with_info(context: ReleaseContext, change: Callable[[dict[str, Any]], Any]) -> None:
    info = json.loads(opened(context).read_info() or "")
    changed = change(info)
    with tiledbsoma.open(context.folder.array, "w") as array:
        if changed is None:
            del array.metadata[INFO_KEY]
        else:
            array.metadata[INFO_KEY] = changed


INFOS: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda _: None, "CxG_embedding_info is missing"),
    (lambda _: "{", "CxG_embedding_info is not JSON"),
    (lambda info: json.dumps([info]), "CxG_embedding_info is a list; expected an object"),
    (lambda info: json.dumps({**info, "n_embeddings": 99}), "n_embeddings is 99; expected 100"),
    (lambda info: json.dumps({**info, "n_features": 2048}), "n_features is 2048; expected 16"),
    (lambda info: json.dumps({**info, "colour": "red"}), "colour is 'red'; expected 'no such key'"),
    (lambda info: json.dumps({k: v for k, v in info.items() if k != "title"}), "title is 'absent'; expected 'Tiny"),
    (lambda info: json.dumps({**info, "experiment_name": "mus"}), "experiment_name is 'mus'; expected 'homo_sapiens'"),
    (lambda info: json.dumps({**info, "data_type": "var"}), "data_type is 'var'; expected 'obs_embedding'"),
    (lambda info: json.dumps({**info, "submission_date": "soon"}), "submission_date is 'soon'; expected '20"),
]


@pytest.mark.parametrize(("change", "text"), INFOS, ids=[text[:24] for _, text in INFOS])
def test_wrong_publication_metadata_is_found(finished: ReleaseContext, change: Callable[[Any], Any], text: str) -> None:
    with_info(finished, change)
    found = broken(finished)
    assert found.keys() == {"publication"}
    assert text in "; ".join(found["publication"])
    finish_array(finished)
    assert broken(finished) == {}


def test_consumers_read_the_publication(finished: ReleaseContext) -> None:
    info = cellxgene_census.experimental.get_embedding_metadata(finished.folder.array)
    assert (info["n_embeddings"], info["n_features"], info["census_version"]) == (100, 16, RELEASE)
    assert info["primary_contact"] == PUBLICATION["primary_contact"]
    beside = yaml.safe_load(finished.store.read(finished.folder.meta))
    assert {**beside, "submission_date": beside["submission_date"].isoformat()} == info
    assert info.keys() == {
        *("id", "embedding_name", "title", "description", "primary_contact", "additional_contacts", "DOI"),
        *("additional_information", "model_link", "data_type", "census_version", "experiment_name"),
        *("measurement_name", "n_embeddings", "n_features", "submission_date"),
    }


def test_another_storage_version_is_said_at_planning_and_refused_at_the_end(
    finished: ReleaseContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OrganismRelease, "storage_version", lambda _: 21)
    assert broken(finished)["storage_version"] == (
        "the array has storage version 22; expected 21, as the Census has (see docs/publish.md)",
    )
    with pytest.raises(RuleError, match="storage version 22"):
        finish_array(finished)


def test_a_set_without_publication_finishes(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OrganismRelease, "storage_version", lambda _: 21)
    tiny(project)
    with project.context("tiny") as context:
        assert make_plan(context).storage_versions == (22, 21)
        assert "storage version: 22; the Census has 21" in describe(dry_run(context, None, recompute=False))
        fill(context)
        assert finish_array(context).published is None
        assert array_state(context) == "verified"
        assert broken(context).keys() == {"storage_version"}
        assert not context.store.exists(context.folder.meta)


def test_checks_in_dagster_name_the_cells(project: Project) -> None:
    tiny(project, mod=2, publication=PUBLICATION)
    defs = build_definitions(
        load_sets(project.folder / "sets"),
        CensusResource(location=project.env["CENSUS_TF_CENSUS"]),
        StoreResource(location=project.env["CENSUS_TF_STORE"], cache=str(project.folder / "cache")),
    )
    instance = dg.DagsterInstance.ephemeral()
    instance.add_dynamic_partitions("census_release", [RELEASE])
    asset = dg.AssetKey(["tiny", "embeddings_array"])
    keys = [dg.AssetCheckKey(asset, name) for name in [*RULES, "verified"]]
    whole = defs.resolve_implicit_global_asset_job_def()

    def run(assets: set[dg.AssetKey]) -> bool:
        chosen = whole.get_subset(asset_selection=assets, asset_check_selection=set(keys))
        return chosen.execute_in_process(instance=instance, partition_key=RELEASE, raise_on_error=False).success

    def evaluations() -> dict[str, dg.AssetCheckEvaluation]:
        latest = instance.event_log_storage.get_latest_asset_check_execution_by_key(keys)
        found = {key.name: record.event.dagster_event for key, record in latest.items() if record.event}
        # A check whose step did not run is only planned.
        return {
            name: event.asset_check_evaluation_data
            for name, event in found.items()
            if event and event.event_type == dg.DagsterEventType.ASSET_CHECK_EVALUATION
        }

    with project.context("tiny") as context:
        fill(context)
        assert run({asset})
        assert {name for name, one in evaluations().items() if one.passed} == {*RULES, "verified"}
        infinite(context)
        # Then the asset is not materialized, and the results of its checks say why.
        assert not run({asset})
        failed = {name: one for name, one in evaluations().items() if not one.passed}
        assert failed.keys() == {"values"}
        assert "2 cells have values that are not finite, joinids [4, 8]" in str(failed["values"].description)
        # The command does the same.
        for more in ([], ["--full"]):
            done = project.command("verify", "tiny", RELEASE, *more)
            assert done.returncode == 1, done.stderr
            assert "values           2 cells have values that are not finite, joinids [4, 8]" in done.stdout
            assert "cells            kept" in done.stdout


BAD = [
    ({"title": "x" * 128}, "title"),
    ({"title": " "}, "title"),
    ({"description": "x" * 2048}, "description"),
    ({"primary_contact": {"name": "Ada", "email": "ada", "affiliation": "A"}}, "primary_contact.email"),
    ({"primary_contact": {"name": "Ada", "email": "ada@b.org"}}, "primary_contact.affiliation"),
    ({"additional_contacts": [{"name": "Ada", "email": "ada@b.org"}]}, "additional_contacts.0.affiliation"),
    ({"DOI": "https://doi.org/10.1038/x"}, "DOI"),
    ({"model_link": "somewhere"}, "model_link"),
    ({"submission_date": "2025-13-01"}, "submission_date"),
    ({"colour": "red"}, "colour"),
    ({"n_embeddings": 5}, "n_embeddings"),
    ({"id": ""}, "id"),
]


@pytest.mark.parametrize(("change", "field"), BAD, ids=[f"{field}{i}" for i, (_, field) in enumerate(BAD)])
def test_bad_publication_is_refused_when_the_set_is_loaded(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Publication.model_validate({**PUBLICATION, **change})
    assert [".".join(map(str, error["loc"])) for error in caught.value.errors()] == [field]


def test_dates_and_links_as_people_write_them() -> None:
    text = "submission_date: 2025-11-20\nmodel_link: s3://models/tf\nDOI: 10.1038/s41592-018-0229-2"
    found = Publication.model_validate({**PUBLICATION, **yaml.safe_load(text)})
    assert (found.submission_date, found.model_link) == ("2025-11-20", "s3://models/tf")


def test_readers_find_the_fragments_metadata_in_one_place(finished: ReleaseContext) -> None:
    gathered = Path(finished.folder.array) / "__fragment_meta"
    assert {path.suffix for path in gathered.iterdir()} == {".meta"}
    finish_array(finished)
    assert array_state(finished) == "verified"
    assert broken(finished) == {}
    with tiledbsoma.open(finished.folder.array) as array:
        assert len(array.read().tables().concat()) == 100 * 16


def test_a_changed_list_of_cells_is_found_and_written_anew(finished: ReleaseContext) -> None:
    listed = Path(finished.folder.obs_ids)
    for content in (b"", listed.read_bytes()[:-1] + b"x", None):
        before = listed.read_bytes()
        listed.unlink() if content is None else listed.write_bytes(content)
        assert broken(finished).keys() == {"obs_ids"}
        with pytest.raises(UserError, match="materialize obs_id_plan again"):
            finish_array(finished)
        make_plan(finished)
        finish_array(finished)
        assert broken(finished) == {}
        assert listed.read_bytes() == before
