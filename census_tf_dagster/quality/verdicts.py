"""Decides whether each quality check passes, with a sentence that gives the reason.

The figures come from `measures`, `census.gene_check` and `upstream_comparison`, the limits from `thresholds`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from census_tf_dagster.census.gene_check import GeneEvidence
from census_tf_dagster.config.thresholds import (
    LEAST_DEVIATIONS,
    LEAST_EXCESS,
    LEAST_LABELLED,
    MOST_SHIFT,
    MOST_SPREAD,
)
from census_tf_dagster.quality.measures import Agreement, Dimensions, Drift
from census_tf_dagster.quality.upstream_comparison import NOT_INSTALLED, UpstreamComparison

NAMED = 10


@dataclass(frozen=True)
class Verdict:
    """The outcome of one check.

    Attributes
    ----------
    passed
        Whether the check passes. It also passes if there is nothing to compare.
    compared
        Whether there was something to compare. If not, `passed` only means that nobody needs to look.
    text
        The reason, for a person.
    grave
        Whether a failure is certainly an error. Otherwise it is a reason to look closer.
    figures
        The figures behind the decision.
    """

    passed: bool
    text: str
    grave: bool = False
    compared: bool = True
    figures: dict[str, float | int | str] = field(default_factory=dict)


def of_neighbours(agreement: Agreement | None) -> Verdict:
    """Check whether neighbours share a cell type more often than by chance."""
    if (
        agreement is None
        or agreement.excess is None
        or agreement.deviations is None
        or agreement.cells < LEAST_LABELLED
    ):
        few = agreement is not None and agreement.cells < LEAST_LABELLED
        why = f"fewer than {LEAST_LABELLED} cells of the sample have a cell type" if few else "cell types cannot differ"
        return Verdict(True, f"Nothing to compare: {why}.", compared=False)
    figures: dict[str, float | int | str] = {
        "share": agreement.share,
        "share_shuffled": agreement.baseline,
        "excess": agreement.excess,
        "deviations": agreement.deviations,
        "cells": agreement.cells,
        "cell_types": agreement.labels,
    }
    passed = agreement.excess >= LEAST_EXCESS and agreement.deviations >= LEAST_DEVIATIONS
    text = (
        f"{agreement.share:.1%} of a cell's neighbours share its cell type, {agreement.baseline:.1%} when types are "
        f"shuffled within each dataset: {agreement.excess:.2f} of the way from chance to perfect (at least "
        f"{LEAST_EXCESS}), {agreement.deviations:,.0f} standard deviations (at least {LEAST_DEVIATIONS:g})."
    )
    return Verdict(passed, text, figures=figures)


def of_dimensions(dimensions: Dimensions) -> Verdict:
    """Check whether each dimension varies. A constant dimension is certainly an error."""
    figures: dict[str, float | int | str] = {
        "dimensions": dimensions.dimensions,
        "constant": len(dimensions.constant),
        "collapsed": len(dimensions.collapsed),
        "effective_rank": dimensions.effective_rank,
    }
    if not dimensions.collapsed:
        text = (
            f"All {dimensions.dimensions:,} dimensions vary; their variance equals that of "
            f"{dimensions.effective_rank:,.1f} equal dimensions."
        )
        return Verdict(True, text, figures=figures)
    text = (
        f"{len(dimensions.collapsed):,} of {dimensions.dimensions:,} dimensions hardly vary over the sample, "
        f"{len(dimensions.constant):,} of them not at all: {', '.join(map(str, dimensions.collapsed[:NAMED]))}"
        f"{', ...' if len(dimensions.collapsed) > NAMED else ''}."
    )
    return Verdict(False, text, grave=bool(dimensions.constant), figures=figures)


def of_drift(drift: Drift | None, before: str | None) -> Verdict:
    """Check how far cell types have moved since an earlier release."""
    if before is None:
        text = "Nothing to compare: no earlier release of this set has a report on the same checkpoint."
        return Verdict(True, text, compared=False)
    if drift is None:
        text = f"Nothing to compare: the samples of this release and of {before} share no cell type."
        return Verdict(True, text, compared=False)
    figures: dict[str, float | int | str] = {
        "previous_release": before,
        "cell_types": drift.types,
        "shift": drift.shift,
        "spread": drift.spread,
        "worst_cell_type": drift.worst_type,
        "worst_shift": drift.worst_shift,
    }
    text = (
        f"Since {before}, {drift.types} cell types have moved by {drift.shift:.2f} standard deviations (median; at "
        f"most {MOST_SHIFT}), and their spread by a factor of {2**drift.spread:.2f} (at most {2**MOST_SPREAD:.2f}). "
        f"The cell type {drift.worst_type} moved most, by {drift.worst_shift:.2f}."
    )
    return Verdict(drift.shift <= MOST_SHIFT and drift.spread <= MOST_SPREAD, text, figures=figures)


def of_genes(evidence: GeneEvidence) -> Verdict:
    """Check whether the gene ids belong to the counts."""
    figures: dict[str, float | int | str] = {"cells": evidence.cells, "housekeeping_genes": evidence.listed}
    if evidence.rank is not None:
        figures["rank"] = evidence.rank
    if evidence.correlation is not None:
        figures["correlation_with_var"] = evidence.correlation
    return Verdict(not evidence.doubts, str(evidence), figures=figures)


def of_comparison(comparison: UpstreamComparison, *, may_lack_upstream: bool = False) -> Verdict:
    """Check the comparison of a shard with upstream's own code.

    `may_lack_upstream`: upstream that is not installed is no reason to warn.
    """
    if comparison.not_done:
        fine = may_lack_upstream and comparison.not_done == NOT_INSTALLED
        return Verdict(fine, f"Not done: {comparison.not_done}", compared=False)
    figures: dict[str, float | int | str] = {
        "cells": len(comparison.joinids),
        "worst_cell": comparison.worst_cell,
        "relative_rms": comparison.relative_rms,
        "centred_cosine": comparison.centred_cosine,
        "bound": comparison.bound,
        "seconds": comparison.seconds,
    }
    text = (
        f"{len(comparison.joinids)} cells of the array were compared with upstream's own code in float32 on the same "
        f"device: the worst differs by {comparison.worst_cell:.1e} of its norm (at most {comparison.bound:.1e})."
    )
    return Verdict(comparison.worst_cell <= comparison.bound, text, grave=True, figures=figures)


def of_comparisons(comparisons: Sequence[UpstreamComparison | None], *, may_lack_upstream: bool = False) -> Verdict:
    """Check the comparisons of all shards of a release together; `may_lack_upstream` as in `of_comparison`."""
    done = {
        comparison.shard: comparison for comparison in comparisons if comparison is not None and not comparison.not_done
    }
    wrong = sorted(shard for shard, comparison in done.items() if comparison.worst_cell > comparison.bound)
    missing = len(comparisons) - len(done)
    figures: dict[str, float | int | str] = {"shards": len(comparisons), "shards_compared": len(done)}
    if done:
        figures["worst_cell"] = max(comparison.worst_cell for comparison in done.values())
        figures["bound"] = max(comparison.bound for comparison in done.values())
    if wrong:
        text = (
            f"{len(wrong)} of {len(done)} compared shards differ from upstream's own code: {wrong[:NAMED]}. "
            "The checks of these shards show by how much."
        )
        return Verdict(False, text, grave=True, figures=figures)
    if missing:
        reasons = sorted({comparison.not_done for comparison in comparisons if comparison and comparison.not_done})
        why = f" {reasons[0]}" if reasons else ""
        text = f"{missing} of {len(comparisons)} shards were not compared with upstream's own code.{why}"
        fine = may_lack_upstream and reasons == [NOT_INSTALLED] and all(comparisons)
        return Verdict(fine, text, compared=bool(done), figures=figures)
    return Verdict(True, f"All {len(done)} shards agree with upstream's own code.", figures=figures)
