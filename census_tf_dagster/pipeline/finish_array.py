"""Finishes an array: verifies that it matches the plan and keeps every rule, then publishes and records it.

The rules themselves belong in `store.rules`, reading values back in `store.verification`.
"""

import json
import platform
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import Any, get_args

import yaml

from census_tf_dagster.census.plan import Plan, PlanTotals, read_plan
from census_tf_dagster.census.release import MEASUREMENT
from census_tf_dagster.config.publication import Publication
from census_tf_dagster.pipeline.context import EmbeddingContext, ReleaseContext, StoredContext
from census_tf_dagster.store.array import EmbeddingsArray
from census_tf_dagster.store.obs_ids import obs_ids_faults, write_obs_ids
from census_tf_dagster.store.rules import (
    Finding,
    Rule,
    column_faults,
    duplicates_faults,
    publication_faults,
    shape_faults,
    storage_version_faults,
)
from census_tf_dagster.store.verification import (
    ReleaseVerification,
    VerificationError,
    release_state,
    require_openable,
    verify_release,
)

REASONS = 10
"""Most reasons for setting cells aside that the array's metadata lists."""
RECORDED_PACKAGES = ("census-tf-dagster", "tiledbsoma", "tiledb", "cellxgene-census", "dagster")


class RuleError(VerificationError):
    """The array breaks rules.

    Attributes
    ----------
    findings
        The findings of all rules, kept and broken.
    """

    def __init__(self, findings: list[Finding]) -> None:
        broken = [str(finding) for finding in findings if finding.wrong]
        super().__init__(
            f"the array breaks {len(broken)} rules; expected none:\n" + "\n".join(f"  {rule}" for rule in broken)
        )
        self.findings = findings


@dataclass(frozen=True)
class ArraySummary:
    """A verified array.

    Attributes
    ----------
    totals
        Totals of its plan. The array holds the plan's cells except those that were set aside.
    cells, set_aside
        Number of cells with an embedding, and the reason for each other cell, by joinid.
    shape
        Rows (obs domain) and features.
    fragments, excess_fragments
        Number of committed writes, and their excess over the planned megabatches. An excess comes from recomputed
        shards or from two workers on one shard. It is harmless, because a cell's last value counts, but paid twice.
    read_again
        Shards that were read again, because their fragments had changed since their verification, or because the
        caller asked for all.
    published
        Content of `CxG_embedding_info`; None for a set without publication.
    uri
        Address of the array.
    identity
        Digest of the identity.
    """

    totals: PlanTotals
    cells: int
    set_aside: dict[int, str]
    shape: tuple[int, int]
    fragments: int
    excess_fragments: int
    read_again: tuple[int, ...]
    published: dict[str, Any] | None
    uri: str
    identity: str

    def reasons(self) -> list[tuple[str, int]]:
        """Return the most frequent reasons for setting cells aside, with the number of cells."""
        return _reasons(self.set_aside)


def _reasons(set_aside: dict[int, str]) -> list[tuple[str, int]]:
    return Counter(set_aside.values()).most_common(REASONS)


def finish_array(
    context: EmbeddingContext, *, full: bool = False, report: Callable[[int, int], None] = lambda _done, _total: None
) -> ArraySummary:
    """Verify the array of the current plan, publish it, and record how it was made.

    Parameters
    ----------
    context
        The opened set, with a release or file.
    full
        Read every value again, not only those written after the shards' verifications.
    report
        Called with the number of shards that were read again, and the number that must be.

    Raises
    ------
    UserError
        When shards have not finished.
    RuleError
        When the array breaks a rule. Then nothing has been published or recorded.
    """
    plan = read_plan(context.store, context.folder.plan)
    verification, findings = _check_rules(context, plan, full=full, report=report)
    # The storage version is an error only for a set that publishes, because the Census's readers expect it.
    publishes = _publication(context) is not None
    if any(finding.wrong and (publishes or finding.rule != "storage_version") for finding in findings):
        raise RuleError(findings)
    array = EmbeddingsArray.open(context.folder.array, context.store, context.identity)
    info = _embedding_info(context, verification, array, datetime.now(UTC).date())
    obs_ids = write_obs_ids(context.store, context.folder, plan, verification.set_aside)
    array.write_info(info)
    if info:
        context.store.write(context.folder.meta, _as_yaml(info))
    array.write_record(
        {
            "checkpoint": PurePosixPath(context.settings.checkpoint).name,
            "plan": plan.totals.plan,
            "covered": verification.covered,
            "cells": verification.cells,
            "cells_set_aside": len(verification.set_aside),
            "set_aside": _reasons(verification.set_aside),
            "obs_ids": obs_ids,
            "verified_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "packages": {name: version(name) for name in RECORDED_PACKAGES},
        }
    )
    array.gather_metadata()
    fragments = len(array.fragments())
    return ArraySummary(
        totals=plan.totals,
        cells=verification.cells,
        set_aside=verification.set_aside,
        shape=array.shape,
        fragments=fragments,
        excess_fragments=max(fragments - plan.totals.megabatches, 0),
        read_again=verification.read_again,
        published=info,
        uri=array.uri,
        identity=context.identity.digest,
    )


def verify_array(
    context: EmbeddingContext, *, full: bool = False, report: Callable[[int, int], None] = lambda _done, _total: None
) -> list[Finding]:
    """Check every rule of a finished array; write only verifications.

    The parameters are those of `finish_array`.

    Raises
    ------
    UserError
        When shards have not finished.
    """
    plan = read_plan(context.store, context.folder.plan)
    verification, findings = _check_rules(context, plan, full=full, report=report)
    array = EmbeddingsArray.open(context.folder.array, context.store, context.identity)
    stored = array.read_info()
    # Only the day on which it was finished may differ.
    submitted = _submission_date(stored) or datetime.now(UTC).date()
    info = _embedding_info(context, verification, array, submitted)
    if info is None:
        faults = [] if stored is None else ["it has CxG_embedding_info, but the set's YAML has no `publication`"]
    else:
        faults = publication_faults(stored, info)
    listed = obs_ids_faults(context.store, context.folder, array.read_record().get("obs_ids"))
    return [*findings, Finding("publication", tuple(faults)), Finding("obs_ids", tuple(listed))]


def array_state(context: StoredContext) -> str:
    """Return whether the array is ``unverified``, ``stale`` (plan or commits have changed) or ``verified``."""
    plan = read_plan(context.store, context.folder.plan)
    return release_state(EmbeddingsArray.open(context.folder.array, context.store, context.identity), plan)


def _check_rules(
    context: EmbeddingContext, plan: Plan, *, full: bool, report: Callable[[int, int], None]
) -> tuple[ReleaseVerification, list[Finding]]:
    """Check all rules except those of publication and of the list of obs ids."""
    uri = context.folder.array
    require_openable(uri, context.store, plan, context.folder)
    if wrong := column_faults(uri, context.store):
        # Nothing else of such an array can be read as an embedding.
        raise RuleError([Finding("schema", tuple(wrong))])
    array = EmbeddingsArray.open(uri, context.store, context.identity)
    faults: dict[Rule, list[str]] = {"schema": duplicates_faults(uri, context.store)}
    faults["shape"] = shape_faults(array.shape, (context.rows(), context.identity.embedding_dim))
    if isinstance(context, ReleaseContext):
        faults["storage_version"] = storage_version_faults(
            context.store.storage_version(array.uri), context.release.storage_version()
        )
    of_file = not isinstance(context, ReleaseContext)
    verification = verify_release(array, plan, context.folder, full=full, report=report, of_file=of_file)
    rules: tuple[Rule, ...] = ("cells", "features", "values")
    faults |= {rule: verification.problems.of_rule(rule) for rule in rules}
    if verification.broken:
        remedy = context.remedy(",".join(map(str, verification.broken)))
        for rule in rules:
            faults[rule] += [remedy] if faults[rule] else []
    if not verification.cells:
        faults["cells"].append("no cell has an embedding")
    faults["cells"] += [f"fragment {name}: {reason}" for name, reason in array.damaged().items()]
    return verification, [Finding(rule, tuple(faults[rule])) for rule in get_args(Rule) if rule in faults]


def _publication(context: EmbeddingContext) -> Publication | None:
    return context.settings.publication if isinstance(context, ReleaseContext) else None


def _embedding_info(
    context: EmbeddingContext, verification: ReleaseVerification, array: EmbeddingsArray, finished: date
) -> dict[str, Any] | None:
    publication = _publication(context)
    if publication is None or not isinstance(context, ReleaseContext):
        return None
    return publication.embedding_info(
        release=context.release_name,
        organism=context.settings.organism,
        measurement=MEASUREMENT,
        n_embeddings=verification.cells,
        n_features=array.n_features,
        finished=finished,
    )


def _submission_date(stored: str | None) -> date | None:
    try:
        return date.fromisoformat(json.loads(stored or "{}")["submission_date"])
    except (ValueError, TypeError, KeyError):
        return None


def _as_yaml(info: dict[str, Any]) -> bytes:
    # The Census's tool expects a date here, and text in the array's metadata.
    content = {**info, "submission_date": date.fromisoformat(info["submission_date"])}
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return text.encode()
