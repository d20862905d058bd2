"""A plan states its identity, so that a run which copies cells finds it without a checkpoint."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from census_tf_dagster.errors import UserError
from census_tf_dagster.identity import Identity
from census_tf_dagster.pipeline.context import PlannedContext, ReleaseContext
from census_tf_dagster.pipeline.plan_release import make_plan
from census_tf_dagster.pipeline.planned_identity import find_planned_identity, write_planned_identity
from census_tf_dagster.store.layout import ReleaseFolder
from tests.support.builders import tiny
from tests.support.project import RELEASE, Project

OTHERS: list[dict[str, Any]] = [
    {"compute_precision": "fp16"},
    {"value_filter": "is_primary_data == True"},
    {"checkpoint": "s3://models/another"},
    {"pretrained_embeddings": ("s3://models/embeddings.h5",)},
    {"checkpoint_fingerprint": "0" * 64},
]


def planned(project: Project) -> ReleaseContext:
    with tiny(project).context("tiny") as context:
        make_plan(context)
    return context


def find(context: ReleaseContext, build_date: str = RELEASE, **settings: Any) -> Identity | None:
    altered = context.settings.model_copy(update=settings)
    return find_planned_identity(
        altered, RELEASE, str(context.release.uri), build_date, context.folder.store, context.store
    )


def test_it_counts_only_for_the_same_work(project: Project) -> None:
    context = planned(project)
    assert find(context) == context.identity
    for other in OTHERS:
        assert find(context, **other) is None, other
    assert find(context, build_date="2025-11-09") is None


def test_a_file_that_was_moved_does_not_count(project: Project) -> None:
    context = planned(project)
    folder = Path(context.folder.root)
    folder.rename(folder.with_name("0" * 12))
    assert find(context) is None


def test_when_weights_were_replaced_at_their_address_only_the_fingerprint_tells_which(project: Project) -> None:
    context = planned(project)
    other = replace(context.identity, checkpoint_fingerprint="0" * 64)
    folder = ReleaseFolder.of(context.folder.store, "tiny", RELEASE, other)
    write_planned_identity(context.store, folder, context.settings, other)
    assert find(context) is None
    for identity in (context.identity, other):
        assert find(context, checkpoint_fingerprint=identity.checkpoint_fingerprint) == identity


def test_without_it_the_checkpoint_is_read(project: Project) -> None:
    """Plans of older versions have none, and a damaged one counts as none."""
    context = planned(project)
    with project.planned("tiny") as found:
        assert type(found) is PlannedContext
        assert (found.identity, found.folder) == (context.identity, context.folder)
    file = Path(context.folder.planned_identity)
    good = file.read_bytes()
    for harm in (good[:-20], b"[]", good.replace(b'"mod": 1', b'"mod": 2'), None):
        file.unlink() if harm is None else file.write_bytes(harm)
        with project.planned("tiny") as found:
            assert isinstance(found, ReleaseContext)
            assert found.identity == context.identity
    shutil.rmtree(project.checkpoint)
    with pytest.raises(UserError, match=r"checkpoint does not exist"), project.planned("tiny"):
        pass
