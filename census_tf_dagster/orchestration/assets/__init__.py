"""The assets of a set, one module each: plan, approval, reused cells (sets with `reuse`), shards, array.

Each asset opens the context of its partition, calls one function of `pipeline`, and returns the summary as metadata.
Computations do not belong here.
"""
