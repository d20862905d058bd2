"""The work on a release, in plain Python: plan, copy or embed a shard, finish the array, assess its quality.

Each function takes plain values and returns a summary. The Dagster assets call them and show the summary; nothing here
imports Dagster.
"""
