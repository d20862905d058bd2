"""Dagster's definitions: keys, partitions, a light import, and YAML that is checked with line numbers."""

import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
import yaml

from census_tf_dagster.definitions import load_sets
from census_tf_dagster.embedding_set import EmbeddingSet
from census_tf_dagster.orchestration.partitions import BY_RELEASE, RELEASES, shard_partitions
from tests.support.project import REPOSITORY

SETS = REPOSITORY / "census_tf_dagster" / "defs"
HEAVY = ("torch", "transcriptformer", "scanpy", "anndata", "numba", "tiledbsoma", "cellxgene_census")


def demo_assets() -> dict[str, dg.AssetsDefinition]:
    assets = [asset for asset in load_sets(SETS).assets or () if isinstance(asset, dg.AssetsDefinition)]
    return {asset.key.to_user_string(): asset for asset in assets}


def test_four_assets_a_set_in_one_group() -> None:
    names = ("obs_id_plan", "approval", "shard_embeddings", "embeddings_array")
    sets = ("demo_human", "demo_marmoset", "demo_mouse")
    found = demo_assets()
    assert sorted(found) == sorted(f"{s}/{name}" for s in sets for name in names)
    for key, asset in found.items():
        assert set(asset.group_names_by_key.values()) == {key.split("/")[0]}
        assert all(asset.descriptions_by_key.values())
    plan, approval, shards, array = (found[f"demo_human/{name}"] for name in names)
    assert plan.partitions_def == approval.partitions_def == array.partitions_def == RELEASES
    assert shards.partitions_def == shard_partitions(4)
    assert approval.asset_deps[approval.key] == {plan.key}
    assert shards.asset_deps[shards.key] == {plan.key, approval.key}
    assert array.asset_deps[array.key] == {shards.key}


def test_a_set_that_reuses_cells_has_one_asset_more(tmp_path: Path) -> None:
    """The partitions have the shards' keys but are not equal to theirs, or Dagster would copy in the shard's run."""
    (tmp_path / "reusing").mkdir()
    attributes = {
        "name": "reusing",
        "organism": "homo_sapiens",
        "checkpoint": "/checkpoint",
        "reuse": True,
        "gene_order": "vocabulary",
    }
    (tmp_path / "reusing" / "defs.yaml").write_text(
        yaml.safe_dump({"type": "census_tf_dagster.embedding_set.EmbeddingSet", "attributes": attributes})
    )
    found = {a.key.path[1]: a for a in load_sets(tmp_path).assets or () if isinstance(a, dg.AssetsDefinition)}
    copies, shards, array = found["reused_embeddings"], found["shard_embeddings"], found["embeddings_array"]
    assert copies.asset_deps[copies.key] == {found["obs_id_plan"].key}
    assert shards.asset_deps[shards.key] == {found["obs_id_plan"].key, found["approval"].key}
    assert array.asset_deps[array.key] == {shards.key, copies.key}
    assert not any(tag.startswith(("ecs/", "dagster-k8s/")) for tag in copies.op.tags)
    assert copies.partitions_def != shards.partitions_def
    instance = dg.DagsterInstance.ephemeral()
    instance.add_dynamic_partitions(str(RELEASES.name), ["r1"])
    keys = [a.partitions_def.get_partition_keys(dynamic_partitions_store=instance) for a in (copies, shards)]  # type: ignore[union-attr]
    assert keys[0] == keys[1]


def test_a_set_with_an_index_has_one_asset_more_after_the_array(tmp_path: Path) -> None:
    (tmp_path / "searched").mkdir()
    attributes = {"name": "searched", "organism": "homo_sapiens", "checkpoint": "/checkpoint", "search_index": True}
    (tmp_path / "searched" / "defs.yaml").write_text(
        yaml.safe_dump({"type": "census_tf_dagster.embedding_set.EmbeddingSet", "attributes": attributes})
    )
    found = {a.key.path[1]: a for a in load_sets(tmp_path).assets or () if isinstance(a, dg.AssetsDefinition)}
    index, array = found["embeddings_index"], found["embeddings_array"]
    assert index.asset_deps[index.key] == {array.key}
    assert index.partitions_def == array.partitions_def
    assert not any(tag.startswith(("ecs/", "dagster-k8s/")) for tag in index.op.tags)


def test_partitions_map_both_ways_between_releases_and_shards() -> None:
    instance = dg.DagsterInstance.ephemeral()
    instance.add_dynamic_partitions(str(RELEASES.name), ["r1", "r2"])
    shards = shard_partitions(12)
    r1 = {f"r1|{i}" for i in range(12)}
    up = BY_RELEASE.get_upstream_mapped_partitions_result_for_partitions(
        RELEASES.subset_with_partition_keys(["r1"]), RELEASES, shards, dynamic_partitions_store=instance
    )
    assert set(up.partitions_subset.get_partition_keys()) == r1
    down = BY_RELEASE.get_upstream_mapped_partitions_result_for_partitions(
        shards.subset_with_partition_keys(["r1|3"]), shards, RELEASES, dynamic_partitions_store=instance
    )
    assert set(down.partitions_subset.get_partition_keys()) == {"r1"}


def test_more_shards_rename_no_shard() -> None:
    few, many = (shard_partitions(shards).get_partitions_def_for_dimension("shard") for shards in (96, 1024))
    assert many.get_partition_keys()[:96] == few.get_partition_keys()


def test_definitions_load_without_the_data_plane() -> None:
    code = (
        "import sys; from census_tf_dagster.definitions import defs; defs(); "
        "import census_tf_dagster.run_coordinator; "
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_field_has_a_line_of_help_and_the_stated_default() -> None:
    fields = EmbeddingSet.model_fields
    assert all(field.description for field in fields.values())
    assert {name: fields[name].default for name in ("shards", "megabatch_size", "mod", "batch_size", "device")} == {
        "shards": 96,
        "megabatch_size": 16384,
        "mod": 1,
        "batch_size": None,
        "device": "cuda",
    }


BAD = [
    ("shards", "four", "'four' is not of type 'integer'"),
    ("device", "tpu", "'tpu' is not one of ['cuda', 'cpu']"),
    ("organism", "homo sapiens", "does not match"),
    ("auto_start", "maybe", "is not valid under any of the given schemas"),
    ("auto_start", {"budget": 0}, "is not valid under any of the given schemas"),
    ("shard", 4, "('shard' was unexpected)"),
]


@pytest.fixture
def checkable(tmp_path: Path) -> Path:
    """A dg project whose sets are in a folder that a test may change."""
    sets = tmp_path / "my_sets" / "defs"
    (sets / "one").mkdir(parents=True)
    (tmp_path / "my_sets" / "__init__.py").touch()
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "my_sets"\n[tool.dg]\ndirectory_type = "project"\n'
        '[tool.dg.project]\nroot_module = "my_sets"\nregistry_modules = ["census_tf_dagster"]\n'
    )
    return sets / "one" / "defs.yaml"


def write(path: Path, **attributes: object) -> None:
    document = yaml.safe_load((SETS / "demo_human" / "defs.yaml").read_text())
    document["attributes"].update(attributes)
    path.write_text(yaml.safe_dump(document, sort_keys=False))


def check_yaml(path: Path) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("dg")), "check", "yaml", str(path.parent)]
    return subprocess.run(command, cwd=path.parents[3], capture_output=True, text=True)


def test_a_right_set_passes_dg_check(checkable: Path) -> None:
    write(checkable)
    done = check_yaml(checkable)
    assert done.returncode == 0, done.stdout + done.stderr


def write_wrong(path: Path, field: str, value: object) -> int:
    write(path, **{field: value})
    return next(i for i, text in enumerate(path.read_text().splitlines(), 1) if text.startswith(f"  {field}:"))


@pytest.mark.parametrize(("field", "value", "message"), BAD)
def test_dg_check_shows_a_wrong_field_with_its_line(checkable: Path, field: str, value: object, message: str) -> None:
    line = write_wrong(checkable, field, value)
    done = check_yaml(checkable)
    assert done.returncode != 0
    assert message in done.stdout
    assert f":{line}" in done.stdout


def test_templates_in_texts_are_resolved(checkable: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELS", "/models")
    write(checkable, checkpoint="{{ env.MODELS }}/tf_exemplar", name="templated")
    (asset, *_) = load_sets(checkable.parent.parent).assets or ()
    assert isinstance(asset, dg.AssetsDefinition)
    assert asset.key.path[0] == "templated"
