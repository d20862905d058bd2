"""Where quality checks draw the line, and why there. Plain numbers: definitions show them and load without numpy."""

UPSTREAM_BOUND = {"fp32": 3e-5, "fp16": 4e-3, "bf16": 3e-2}
"""Per cell ||ours - upstream|| / ||upstream||, upstream in float32, by compute precision. fp32: upstream itself moves
by 1.1e-5 between torch 2.5.1 and 2.13. fp16 and bf16: twice what was measured over some cells at tf_exemplar's shape
with random weights, 1.9e-3 and 1.5e-2 (docs/performance.md), as this is the worst of a few cells."""

STORAGE_BOUND = {"float32": 0.0, "bfloat16": 2.0**-8}
"""Added by storage precision: rounding to 7 mantissa bits moves no value by more than this share of itself."""

LEAST_EXCESS = 0.05
"""Of neighbours that share a cell type beyond chance: 0 is chance, 1 is perfect. A model that knows nothing of cells
but how long they are stays near 0; trained ones are expected far above (not measured: no trained weights here)."""

LEAST_DEVIATIONS = 5.0
"""And that in standard deviations of the shuffles, so that a small sample is no evidence by luck."""

LEAST_LABELLED = 200
"""Cells with a known cell type; with fewer, neighbours say nothing."""

MOST_SHIFT = 0.5
"""Standard deviations by which a cell type's mean may move, root mean square over dimensions. The same cells by
the same model do not move at all; new datasets of a type move it a little; another gene order or checkpoint
moves it by one and more."""

MOST_SPREAD = 0.5
"""Mean |log2| of the ratio of standard deviations: a factor of 1.41."""


LEAST_RANK = 0.7
"""How often a housekeeping gene is expressed by more cells than another expressed gene; 0.5 is chance. Measured: 0.96
on 1,107 human cells and the genes of chromosome 21, 0.78 on 700 blood cells and 765 genes chosen because they vary;
at most 0.64 in 1,000 permutations of the latter (docs/quality.md)."""

LEAST_CORRELATION = 0.2
"""Between the cells that express a gene by `var` and by a sample of X (Spearman, over the genes expressed in the
sample). Measured: above 0.9 on real data; a permuted `var` gives 0 +- 0.07 for 200 genes. The bound is low, as a set's
cells may be unlike those of the whole Census."""


def upstream_bound(compute_precision: str, storage_precision: str) -> float:
    """Return how far a cell may lie from upstream's, relative to its norm."""
    return UPSTREAM_BOUND[compute_precision] + STORAGE_BOUND[storage_precision]
