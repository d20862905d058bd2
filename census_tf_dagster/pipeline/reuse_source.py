"""Finds the earlier array that cells can be copied from: the set's newest earlier release with a verified array.

Copying belongs in `copy_shard`, the keys of cells in `census.cell_keys`.
"""

import json
from dataclasses import dataclass

from census_tf_dagster.census.plan import Source, read_plan
from census_tf_dagster.errors import UserError
from census_tf_dagster.identity import Identity
from census_tf_dagster.pipeline.context import PlannedContext, ReleaseContext
from census_tf_dagster.store.array import EmbeddingsArray
from census_tf_dagster.store.layout import ReleaseFolder
from census_tf_dagster.store.verification import all_set_aside, release_state


@dataclass(frozen=True)
class FoundSource:
    """The result of `find_source`.

    Attributes
    ----------
    source, keys
        The array to copy from (None if there is none), and the file with the keys of its cells.
    passed_over
        The newer arrays that cannot be used, each with the reason; all arrays if none can be used.
    set_aside
        Joinids of the earlier release whose cells have no embedding in the array.
    """

    source: Source | None
    keys: str
    passed_over: tuple[str, ...]
    set_aside: tuple[int, ...] = ()


NO_SOURCE = FoundSource(None, "", ())


def find_source(context: ReleaseContext) -> FoundSource:
    """Search the arrays of the set's earlier releases, newest first. Reads only metadata."""
    candidates: list[tuple[ReleaseFolder, Identity]] = []
    passed_over: list[str] = []
    for release_folder in context.store.list(context.folder.set_folder):
        for entry in context.store.list(release_folder.rstrip("/")):
            earlier = ReleaseFolder(f"{context.folder.set_folder}/{ReleaseFolder(entry.rstrip('/')).name}")
            try:
                identity = _stored_identity(context, earlier)
            except UserError as error:
                passed_over.append(f"{earlier.name}: {error}")
                continue
            if identity is not None and identity.census_build_date < context.identity.census_build_date:
                candidates.append((earlier, identity))
    candidates.sort(key=lambda candidate: (candidate[1].census_build_date, candidate[0].root), reverse=True)
    for folder, identity in candidates:
        name = folder.name
        try:
            if differing := context.identity.values_differ(identity):
                passed_over.append(f"{name}: other {', '.join(differing)}")
                continue
            plan = read_plan(context.store, folder.plan)
            array = EmbeddingsArray.open(folder.array, context.store, identity)
            state = release_state(array, plan)
        except UserError as error:
            passed_over.append(f"{name}: {error}")
            continue
        if state != "verified":
            passed_over.append(f"{name}: its array is {state}")
        elif not context.store.exists(plan.keys):
            passed_over.append(
                f"{name}: its plan was made without `reuse`, so it has no keys; materialize its obs_id_plan again"
            )
        else:
            source = Source(release=folder.release, root=folder.root, identity=identity.digest)
            return FoundSource(source, plan.keys, tuple(passed_over), tuple(all_set_aside(array, plan, folder)))
    return FoundSource(None, "", tuple(passed_over))


def open_source(context: PlannedContext, source: Source) -> EmbeddingsArray:
    """Open the array that a plan copies from, if it is still the verified one that the plan names.

    Raises
    ------
    UserError
        When the array is missing, has another identity, or is no longer verified.
    """
    folder = ReleaseFolder(source.root)
    try:
        identity = _stored_identity(context, folder)
        if identity is None:
            raise UserError("the array is missing")
        if identity.digest != source.identity:
            raise UserError(f"its identity is {identity.digest[:12]}, but the plan names {source.identity[:12]}")
        if differing := context.identity.values_differ(identity):
            raise UserError(f"it has other {', '.join(differing)}")
        array = EmbeddingsArray.open(folder.array, context.store, identity)
        if (state := release_state(array, read_plan(context.store, folder.plan))) != "verified":
            raise UserError(f"the array is {state}, not verified")
    except UserError as error:
        raise source_error(source, str(error)) from error
    return array


def source_error(source: Source, problem: str) -> UserError:
    """Make the error for an array from which cells can no longer be copied."""
    return UserError(
        f"cells cannot be copied from {source.root}: {problem}. Expected the verified array that the plan names: "
        "materialize obs_id_plan of this release again. Its new plan computes these cells, or finds another array; "
        "copied cells stay."
    )


def _stored_identity(context: PlannedContext, folder: ReleaseFolder) -> Identity | None:
    """Read the identity of the array below a folder; None if the folder has no array of this project."""
    if not context.store.holds_files(folder.array):
        return None
    _, stored = EmbeddingsArray.look(folder.array, context.store)
    try:
        return Identity(**json.loads(stored)) if stored else None
    except (ValueError, TypeError) as error:
        raise UserError(f"its identity cannot be read ({error})") from error
