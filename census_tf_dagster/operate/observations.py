"""Reads the progress that running shards reported as observations. The shards report it in `orchestration`."""

from collections.abc import Sequence
from dataclasses import dataclass

from census_tf_dagster.config.dagster_names import SHARDS, key_of
from census_tf_dagster.operate.graphql import Deployment, expect
from census_tf_dagster.operate.remote_set import RemoteSet
from census_tf_dagster.operate.runs import Run

MOST_AT_ONCE = 200
"""The most shards of one query."""

SHARD_QUERY = """s{number}: assetObservations(partitions: [$p{number}], limit: 1) {{
  runId timestamp
  metadataEntries {{
    label
    ... on IntMetadataEntry {{ intRepr }} ... on FloatMetadataEntry {{ floatValue }} ... on TextMetadataEntry {{ text }}
  }}
}}"""


@dataclass(frozen=True)
class ShardProgress:
    """The progress that a running shard reported last. It is at most half a minute and one megabatch old."""

    cells_done: int
    cells_per_second: float
    limited_by: str
    at: float
    """The time of the report, in seconds since 1970."""


def progress_of(deployment: Deployment, remote_set: RemoteSet, running: Sequence[Run]) -> dict[str, ShardProgress]:
    """Return the last progress of each running shard, by partition. Shards without a report are left out."""
    found: dict[str, ShardProgress] = {}
    for first in range(0, len(running), MOST_AT_ONCE):
        runs = running[first : first + MOST_AT_ONCE]
        declared = "".join(f", $p{number}: String!" for number in range(len(runs)))
        asked = "\n".join(SHARD_QUERY.format(number=number) for number in range(len(runs)))
        query = (
            f"query Progress($asset: AssetKeyInput!{declared}) {{ assetNodeOrError(assetKey: $asset) {{ __typename "
            f"... on Error {{ message }} ... on AssetNode {{ {asked} }} }} }}"
        )
        partitions = {f"p{number}": run.partition for number, run in enumerate(runs)}
        answer = deployment.ask(query, asset=remote_set.key(SHARDS), **partitions)["assetNodeOrError"]
        node = expect(answer, "AssetNode", f"{remote_set.name}/{SHARDS}")
        for number, run in enumerate(runs):
            for observation in node[f"s{number}"]:
                # An observation of another run belongs to an earlier attempt.
                if observation["runId"] == run.id:
                    found[run.partition] = _read(observation["metadataEntries"], float(observation["timestamp"]) / 1000)
    return found


def _read(entries: Sequence[dict[str, object]], at: float) -> ShardProgress:
    values = {
        key_of(str(entry["label"])): entry[kind]
        for entry in entries
        for kind in ("intRepr", "floatValue", "text")
        if kind in entry
    }
    return ShardProgress(
        cells_done=int(str(values.get("cells_done", 0))),
        cells_per_second=float(str(values.get("cells_per_second", 0.0))),
        limited_by=str(values.get("limited_by", "unknown")),
        at=at,
    )
