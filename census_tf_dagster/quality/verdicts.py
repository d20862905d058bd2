"""Decides whether each quality check passes, with a sentence that gives the reason.

The figures come from `measures`, `census.gene_check` and `upstream_comparison`, the limits from `thresholds`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from census_tf_dagster.census.gene_check import GeneEvidence
from census_tf_dagster.quality.measures import Agreement, Dimensions, Drift
from census_tf_dagster.quality.thresholds import (
    LEAST_DEVIATIONS,
    LEAST_EXCESS,
    LEAST_LABELLED,
    MOST_SHIFT,
    MOST_SPREAD,
)
from census_tf_dagster.quality.upstream_comparison import UpstreamComparison

NAMED = 10


@dataclass(frozen=True)
class Verdict:
    """The outcome of one check.

    Attributes
    ----------
    passed
        Whether the check passes. It also passes if there is nothing to compare.
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
    figures: dict[str, float | int | str] = field(default_factory=dict)


def of_neighbours(found: Agreement | None) -> Verdict:
    """Check whether neighbours share a cell type more often than by chance."""
    if found is None or found.excess is None or found.deviations is None or found.cells < LEAST_LABELLED:
        few = found is not None and found.cells < LEAST_LABELLED
        why = f"fewer than {LEAST_LABELLED} cells of the sample have a cell type" if few else "cell types cannot differ"
        return Verdict(True, f"Nothing to compare: {why}.")
    figures: dict[str, float | int | str] = {
        "share": found.share,
        "share_shuffled": found.baseline,
        "excess": found.excess,
        "deviations": found.deviations,
        "cells": found.cells,
        "cell_types": found.labels,
    }
    passed = found.excess >= LEAST_EXCESS and found.deviations >= LEAST_DEVIATIONS
    text = (
        f"{found.share:.1%} of a cell's neighbours share its cell type, {found.baseline:.1%} when types are shuffled "
        f"within each dataset: {found.excess:.2f} of the way from chance to perfect (at least {LEAST_EXCESS}), "
        f"{found.deviations:,.0f} standard deviations (at least {LEAST_DEVIATIONS:g})."
    )
    return Verdict(passed, text, figures=figures)


def of_dimensions(found: Dimensions) -> Verdict:
    """Check whether each dimension varies. A constant dimension is certainly an error."""
    figures: dict[str, float | int | str] = {
        "dimensions": found.dimensions,
        "constant": len(found.constant),
        "collapsed": len(found.collapsed),
        "effective_rank": found.effective_rank,
    }
    if not found.collapsed:
        text = (
            f"All {found.dimensions:,} dimensions vary; their variance equals that of {found.effective_rank:,.1f} "
            "equal dimensions."
        )
        return Verdict(True, text, figures=figures)
    text = (
        f"{len(found.collapsed):,} of {found.dimensions:,} dimensions hardly vary over the sample, "
        f"{len(found.constant):,} of them not at all: {', '.join(map(str, found.collapsed[:NAMED]))}"
        f"{', ...' if len(found.collapsed) > NAMED else ''}."
    )
    return Verdict(False, text, grave=bool(found.constant), figures=figures)


def of_drift(found: Drift | None, before: str | None) -> Verdict:
    """Check how far cell types have moved since an earlier release."""
    if before is None:
        return Verdict(True, "Nothing to compare: no earlier release of this set has a report on the same checkpoint.")
    if found is None:
        return Verdict(True, f"Nothing to compare: the samples of this release and of {before} share no cell type.")
    figures: dict[str, float | int | str] = {
        "previous_release": before,
        "cell_types": found.types,
        "shift": found.shift,
        "spread": found.spread,
        "worst_cell_type": found.worst_type,
        "worst_shift": found.worst_shift,
    }
    text = (
        f"Since {before}, {found.types} cell types have moved by {found.shift:.2f} standard deviations (median; at "
        f"most {MOST_SHIFT}), and their spread by a factor of {2**found.spread:.2f} (at most {2**MOST_SPREAD:.2f}). "
        f"The cell type {found.worst_type} moved most, by {found.worst_shift:.2f}."
    )
    return Verdict(found.shift <= MOST_SHIFT and found.spread <= MOST_SPREAD, text, figures=figures)


def of_genes(found: GeneEvidence) -> Verdict:
    """Check whether the gene ids belong to the counts."""
    figures: dict[str, float | int | str] = {"cells": found.cells, "housekeeping_genes": found.listed}
    if found.rank is not None:
        figures["rank"] = found.rank
    if found.correlation is not None:
        figures["correlation_with_var"] = found.correlation
    return Verdict(not found.doubts, str(found), figures=figures)


def of_comparison(found: UpstreamComparison) -> Verdict:
    """Check the comparison of a shard with upstream's own code."""
    if found.not_done:
        return Verdict(False, f"Not done: {found.not_done}")
    figures: dict[str, float | int | str] = {
        "cells": len(found.joinids),
        "worst_cell": found.worst_cell,
        "relative_rms": found.relative_rms,
        "centred_cosine": found.centred_cosine,
        "bound": found.bound,
        "seconds": found.seconds,
    }
    text = (
        f"{len(found.joinids)} cells of the array were compared with upstream's own code in float32 on the same "
        f"device: the worst differs by {found.worst_cell:.1e} of its norm (at most {found.bound:.1e})."
    )
    return Verdict(found.worst_cell <= found.bound, text, grave=True, figures=figures)


def of_comparisons(found: Sequence[UpstreamComparison | None]) -> Verdict:
    """Check the comparisons of all shards of a release together."""
    done = {comparison.shard: comparison for comparison in found if comparison is not None and not comparison.not_done}
    wrong = sorted(shard for shard, comparison in done.items() if comparison.worst_cell > comparison.bound)
    missing = len(found) - len(done)
    figures: dict[str, float | int | str] = {"shards": len(found), "shards_compared": len(done)}
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
        reasons = sorted({comparison.not_done for comparison in found if comparison and comparison.not_done})
        why = f" {reasons[0]}" if reasons else ""
        text = f"{missing} of {len(found)} shards were not compared with upstream's own code.{why}"
        return Verdict(False, text, figures=figures)
    return Verdict(True, f"All {len(done)} shards agree with upstream's own code.", figures=figures)
