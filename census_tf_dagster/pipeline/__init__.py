"""The three steps of a release in plain Python: plan, embed a shard, finish the array.

Each takes plain values and returns a summary; the Dagster assets only call them and show the summary.
"""
