"""Files or values of an array that change after verification: runs notice it, and running the shard again mends it."""

import json
import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiledb
import tiledbsoma

from census_tf_dagster.census.plan import Plan, read_plan
from census_tf_dagster.errors import UserError
from census_tf_dagster.pipeline.context import ReleaseContext
from census_tf_dagster.pipeline.embed_shard import embed_shard
from census_tf_dagster.pipeline.finish_array import RuleError, array_state, finish_array, verify_array
from census_tf_dagster.pipeline.plan_release import make_plan
from census_tf_dagster.store.array import EmbeddingsArray
from census_tf_dagster.store.fragments import Fragment
from tests.support.builders import fill, fill_shard, tiny
from tests.support.project import RELEASE, Project, read_array

pytestmark = pytest.mark.takes(150)

CELL = 57
"""The cell whose value, fragment or shard is damaged."""


@pytest.fixture
def finished(project: Project) -> Iterator[ReleaseContext]:
    """Make a finished array of 200 cells in four shards, with megabatches of 16 cells."""
    tiny(project)
    with project.context("tiny") as context:
        fill(context)
        finish_array(context)
        yield context


def opened(context: ReleaseContext) -> EmbeddingsArray:
    return EmbeddingsArray.open(context.folder.array, context.store, context.identity)


def fragment_of(context: ReleaseContext, joinid: int = CELL) -> Fragment:
    (found,) = [one for one in opened(context).fragments() if one.first <= joinid <= one.last]
    return found


def shard_of(context: ReleaseContext, joinid: int = CELL) -> int:
    (batch,) = [one for one in planned(context).megabatches if one.first <= joinid <= one.last]
    return batch.shard


def planned(context: ReleaseContext) -> Plan:
    return read_plan(context.store, context.folder.plan)


def folder_of(context: ReleaseContext) -> Path:
    return Path(context.folder.array) / "__fragments" / fragment_of(context).name


def put(
    context: ReleaseContext, joinids: list[int], features: list[int], values: list[float], timestamp: int | None = None
) -> None:
    """Commit values as any program could."""
    columns = {"soma_dim_0": joinids, "soma_dim_1": features, "soma_data": np.array(values, np.float32)}
    with tiledbsoma.open(context.folder.array, "w", tiledb_timestamp=timestamp) as array:
        array.write(pa.table(columns))


def wrong(context: ReleaseContext, *, full: bool = False) -> dict[str, str]:
    """Return what is wrong, by rule."""
    try:
        findings = verify_array(context, full=full)
    except RuleError as error:
        findings = error.findings
    return {finding.rule: "; ".join(finding.wrong) for finding in findings if finding.wrong}


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


def later_value(context: ReleaseContext) -> None:
    put(context, [CELL], [3], [0.125])


def later_value_of_two_shards(context: ReleaseContext) -> None:
    put(context, [CELL, 150], [3, 3], [0.125, 0.125])


def flipped_values(context: ReleaseContext) -> None:
    flip(folder_of(context) / "a0.tdb", 200)


def flipped_coordinates(context: ReleaseContext) -> None:
    flip(folder_of(context) / "d0.tdb", 30)


def without_values(context: ReleaseContext) -> None:
    (folder_of(context) / "a0.tdb").unlink()


def shorter_values(context: ReleaseContext) -> None:
    os.truncate(folder_of(context) / "a0.tdb", 40)


def shorter_metadata(context: ReleaseContext) -> None:
    path = folder_of(context) / "__fragment_metadata.tdb"
    os.truncate(path, path.stat().st_size - 400)


def without_fragment(context: ReleaseContext) -> None:
    shutil.rmtree(folder_of(context))


def without_fragment_and_gathered_metadata(context: ReleaseContext) -> None:
    shutil.rmtree(folder_of(context))
    shutil.rmtree(Path(context.folder.array) / "__fragment_meta")


def without_fragment_and_commit(context: ReleaseContext) -> None:
    name = fragment_of(context).name
    shutil.rmtree(folder_of(context))
    (Path(context.folder.array) / "__commits" / f"{name}.wrt").unlink()


def without_fragment_commit_and_its_name_in_the_verification(context: ReleaseContext) -> None:
    name = fragment_of(context).name
    without_fragment_and_commit(context)
    verification = Path(context.folder.verification(planned(context).totals.plan, shard_of(context)))
    content = json.loads(verification.read_bytes())
    del content["fragments"][name]
    verification.write_text(json.dumps(content))


def from_a_clock_that_is_ahead(context: ReleaseContext) -> None:
    put(context, [CELL], [3], [0.125], timestamp=int(time.time() * 1000) + 3_600_000)


SEEN_IN_METADATA: list[Callable[[ReleaseContext], None]] = [
    later_value,
    later_value_of_two_shards,
    without_values,
    shorter_values,
    shorter_metadata,
    without_fragment,
    without_fragment_and_gathered_metadata,
    without_fragment_and_commit,
    without_fragment_commit_and_its_name_in_the_verification,
    from_a_clock_that_is_ahead,
]
UNOPENABLE = (without_fragment, without_fragment_and_gathered_metadata)
SEEN_BY_READING: list[Callable[[ReleaseContext], None]] = [flipped_values, flipped_coordinates]


@pytest.mark.parametrize("damage", [*SEEN_IN_METADATA, *SEEN_BY_READING], ids=lambda one: one.__name__)
def test_damage_is_noticed_and_mended_by_running_the_shard(
    finished: ReleaseContext, project: Project, damage: Callable[[ReleaseContext], None]
) -> None:
    before = read_array(finished.folder.array, project.folder)
    assert wrong(finished) == wrong(finished, full=True) == {}
    shard = shard_of(finished)
    damage(finished)
    if damage in UNOPENABLE:
        with pytest.raises(UserError, match=rf"They belong to shards \[{shard}\]\."):
            wrong(finished)
    else:
        told = "; ".join(wrong(finished, full=damage in SEEN_BY_READING).values())
        if damage is from_a_clock_that_is_ahead:
            assert "its writer's clock was ahead" in told
        else:
            shards = f"{shard},{shard_of(finished, 150)}" if damage is later_value_of_two_shards else shard
            assert f"run their shards again: census-tf-dagster launch tiny {RELEASE} --shards {shards}" in told
        with pytest.raises(RuleError):
            finish_array(finished)
    fill_shard(finished, shard)
    for other in {0, 1, 2, 3} - {shard} if damage is later_value_of_two_shards else ():
        fill_shard(finished, other)
    finish_array(finished)
    assert wrong(finished) == wrong(finished, full=True) == {}
    after = read_array(finished.folder.array, project.folder)
    assert np.array_equal(before.ids, after.ids)
    assert np.array_equal(before.values, after.values)


@pytest.mark.parametrize("harm", ["flipped", "cut short", "empty"])
@pytest.mark.parametrize("part", ["__fragment_meta", "__meta"])
def test_damaged_metadata_is_named_and_written_anew(
    finished: ReleaseContext, project: Project, part: str, harm: str
) -> None:
    before = read_array(finished.folder.array, project.folder)
    path = max((Path(finished.folder.array) / part).iterdir(), key=lambda one: int(one.name.split("_")[3]))
    if harm == "flipped":
        flip(path, path.stat().st_size // 2)
    else:
        os.truncate(path, 0 if harm == "empty" else path.stat().st_size // 2)
    for _ in range(2):
        with pytest.raises(UserError, match=rf"files in {part} are damaged .*run any of its shards again") as caught:
            wrong(finished)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600
    assert fill_shard(finished, 0) == 0
    finish_array(finished)
    assert wrong(finished) == wrong(finished, full=True) == {}
    assert array_state(finished) == "verified"
    assert np.array_equal(before.values, read_array(finished.folder.array, project.folder).values)


@pytest.mark.parametrize("harm", ["flipped", "removed"])
def test_a_damaged_schema_is_named(finished: ReleaseContext, harm: str) -> None:
    (path,) = (one for one in (Path(finished.folder.array) / "__schema").iterdir() if one.is_file())
    flip(path, path.stat().st_size // 2) if harm == "flipped" else path.unlink()
    for attempt in (wrong, finish_array, make_plan, lambda one: fill_shard(one, 0)):
        with pytest.raises(UserError, match=r"files in __schema are .*: restore them .* or remove the release") as told:
            attempt(finished)
        assert "\n" not in str(told.value)


def test_an_array_that_is_gone_is_named(finished: ReleaseContext) -> None:
    shutil.rmtree(finished.folder.array)
    with pytest.raises(UserError, match=r"there is no array at .*: materialize obs_id_plan"):
        wrong(finished)


def test_cells_of_nobody_go_when_a_shard_runs_again(project: Project) -> None:
    tiny(project, mod=2)
    with project.context("tiny") as context:
        fill(context)
        finish_array(context)
        before = read_array(context.folder.array, project.folder)
        put(context, [57, 58], [3, 4], [0.125, 0.25])
        assert "1 cells are in the array but not planned, joinids [57]" in wrong(context)["cells"]
        # Without the stray fragment each megabatch is right, so nothing is computed.
        assert fill_shard(context, shard_of(context, 58)) == 0
        assert wrong(context) == {}
        after = read_array(context.folder.array, project.folder)
        assert np.array_equal(before.values, after.values)


def test_a_real_shard_mends_itself(project: Project) -> None:
    tiny(project, shards=1, cells=60)
    with project.context("tiny") as context:
        make_plan(context)
        assert embed_shard(context, 0).megabatches_mended == 0
        before = read_array(context.folder.array, project.folder)
        flipped_values(context)
        again = embed_shard(context, 0)
        assert (again.megabatches_computed, again.megabatches_mended, again.verified) == (1, 1, True)
        assert np.array_equal(before.values, read_array(context.folder.array, project.folder).values)
        whole = embed_shard(context, 0)
        assert (whole.megabatches_computed, whole.megabatches_mended, whole.verified) == (0, 0, True)


def test_values_of_a_run_that_ended_before_the_verification_are_held_to_its_note(
    finished: ReleaseContext, project: Project
) -> None:
    """Damage between the commit and the first reading is handled like damage after it."""
    before = read_array(finished.folder.array, project.folder)
    Path(finished.folder.verification(planned(finished).totals.plan, shard_of(finished))).unlink()
    later_value(finished)
    assert "hold other values than were written" in wrong(finished)["values"]
    fill_shard(finished, shard_of(finished))
    assert np.array_equal(before.values, read_array(finished.folder.array, project.folder).values)


def test_a_damaged_verification_is_written_anew_by_running_the_shard(finished: ReleaseContext) -> None:
    verification = Path(finished.folder.verification(planned(finished).totals.plan, 1))
    content = json.loads(verification.read_bytes())
    for damaged in (b"", b"[]", json.dumps({**content, "megabatches": content["megabatches"][1:]}).encode()):
        verification.write_bytes(damaged)
        fill_shard(finished, 1)
        assert json.loads(verification.read_bytes()) == content


def renamed_into_the_future(folder: Path, hours: int) -> None:
    """Give all files of TileDB below a folder the names that a writer with a fast clock would give."""
    for path in sorted(folder.rglob("__*"), key=lambda one: len(one.parts), reverse=True):
        # Fragments name their schema, and TileDB ignores when that was written.
        found = re.fullmatch(r"__(\d{13})_(\d{13})_(.*)", path.name)
        if found and path.parent.name != "__schema":
            first, last = (int(found[i]) + hours * 3_600_000 for i in (1, 2))
            path.rename(path.with_name(f"__{first}_{last}_{found[3]}"))


def test_a_census_from_a_clock_that_is_ahead_can_be_read(project: Project) -> None:
    tiny(project)
    renamed_into_the_future(project.census, 1)
    with project.context("tiny") as context:
        fill(context)
        finish_array(context)
    assert np.array_equal(read_array(project.array("tiny"), project.folder).ids, np.arange(200))


def test_no_write_of_ours_depends_on_a_clock(finished: ReleaseContext) -> None:
    names = [one.name for one in opened(finished).fragments()]
    assert all(int(name.split("_")[2]) < 1000 for name in names)
    opened(finished).write(np.array([CELL]), np.ones((1, 16), np.float32))
    newest = max(opened(finished).fragments(), key=lambda one: int(one.name.split("_")[2]))
    assert newest.name not in names
    assert int(newest.name.split("_")[2]) < 1000


DATA_FILES = ("a0.tdb", "d0.tdb", "d1.tdb")


def stored(context: ReleaseContext) -> pa.Table | None:
    """Return all values of the array, in order; None if TileDB cannot read it."""
    try:
        with tiledbsoma.open(context.folder.array) as array:
            return array.read().tables().concat().sort_by([("soma_dim_0", "ascending"), ("soma_dim_1", "ascending")])
    except tiledbsoma.SOMAError:
        return None


def damage_at_random(project: Project, trials: int, seed: int) -> str:
    """Change 1, 3 or 200 random bytes of data files, many times; return the number of each outcome."""
    tiny(project, cells=96, shards=2)
    rng = random.Random(seed)
    differed = unreadable = unchanged = 0
    with project.context("tiny") as context:
        fill(context)
        finish_array(context)
        before = stored(context)
        for trial in range(trials):
            files = sorted(
                path for name in DATA_FILES for path in Path(context.folder.array).glob(f"__fragments/*/{name}")
            )
            for _ in range((1, 3, 200)[trial % 3]):
                path = rng.choice(files)
                flip(path, rng.randrange(path.stat().st_size))
            found, now = wrong(context, full=True), stored(context)
            assert found or now == before, "a change of values was not noticed"
            unreadable += now is None
            differed += now is not None and now != before
            unchanged += now == before
            for shard in range(2):
                fill_shard(context, shard)
            finish_array(context)
            assert wrong(context, full=True) == {}
            assert stored(context) == before
    return f"unreadable {unreadable}, other values {differed}, the same values {unchanged}"


def test_random_bytes_are_noticed_and_mended(project: Project) -> None:
    damage_at_random(project, trials=3, seed=1)


@pytest.mark.soak
def test_random_bytes_in_200_trials(project: Project) -> None:
    started = time.monotonic()
    told = damage_at_random(project, trials=200, seed=2)
    print(f"200 trials, seed 2, tiledb {tiledb.__version__}: {told}; each noticed and mended by running the shards")
    print(f"{time.monotonic() - started:.0f} s")
