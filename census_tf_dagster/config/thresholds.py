"""The thresholds of quality checks, with their reasons. Only numbers: the definitions show them without numpy."""

UPSTREAM_BOUND = {"fp32": 3e-5, "fp16": 4e-3, "bf16": 3e-2}
"""Largest ||ours - upstream|| / ||upstream|| of a cell, by compute precision; upstream computes in float32. fp32:
upstream's own values differ by 1.1e-5 between torch 2.5.1 and 2.13. fp16 and bf16: twice the values that were measured
over some cells at tf_exemplar's shape with random weights, 1.9e-3 and 1.5e-2 (docs/performance.md), because the check
takes the worst of a few cells."""

STORAGE_BOUND = {"float32": 0.0, "bfloat16": 2.0**-8}
"""Added to that bound, by storage precision. Rounding to 7 mantissa bits changes no value by more than this share."""

LEAST_EXCESS = 0.05
"""Least excess of neighbours that share a cell type: 0 is chance, 1 is perfect. A model that knows only the number of
genes of a cell stays near 0. Trained models are expected far above (not measured: no trained weights here)."""

LEAST_DEVIATIONS = 5.0
"""Least excess in standard deviations of the shuffles, so that a small sample does not pass by luck."""

LEAST_LABELLED = 200
"""Least number of cells with a known cell type. With fewer, neighbours say nothing."""

MOST_SHIFT = 0.5
"""Most standard deviations by which a cell type's mean may move, root mean square over dimensions. With the same cells
and the same model it does not move. New datasets of a type move it a little. Another gene order or checkpoint moves it
by one or more."""

MOST_SPREAD = 0.5
"""Largest mean |log2| of the ratio of standard deviations, which is a factor of 1.41."""


LEAST_RANK = 0.7
"""Least share of pairs in which more cells express the housekeeping gene than the other expressed gene; 0.5 is chance.
Measured: 0.96 on 1,107 human cells and the genes of chromosome 21, 0.78 on 700 blood cells and 765 genes chosen because
they vary; at most 0.64 in 1,000 permutations of the latter (docs/quality.md)."""

LEAST_CORRELATION = 0.2
"""Least correlation between the numbers of cells that express a gene in `var` and in a sample of X (Spearman, over the
genes expressed in the sample). Measured: above 0.9 on real data; a permuted `var` gives 0 +- 0.07 for 200 genes. The
bound is low, because a set's cells may differ from those of the whole Census."""


LEAST_RECALL = 0.95
"""Least share of the exact 10 nearest neighbours of a cell that the index finds. For each one that it misses, it finds
a cell that is hardly farther away, so labels that neighbours vote for bear less."""


def upstream_bound(compute_precision: str, storage_precision: str) -> float:
    """Return the largest allowed distance of a cell from upstream's, relative to its norm."""
    return UPSTREAM_BOUND[compute_precision] + STORAGE_BOUND[storage_precision]
