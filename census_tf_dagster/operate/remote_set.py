"""Finds a set in a running deployment: its code location, releases and shards."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from census_tf_dagster.config.dagster_names import ARRAY, PLAN, REUSED, SHARDS
from census_tf_dagster.errors import UserError
from census_tf_dagster.operate.graphql import Deployment, expect
from census_tf_dagster.operate.shard_ranges import compact

CATALOG = """{
  assetNodes {
    assetKey { path }
    repository { location { name } }
    partitionKeysByDimension { name partitionKeys }
  }
  workspaceOrError {
    __typename
    ... on Error { message }
    ... on Workspace { locationEntries { name locationOrLoadError { __typename ... on PythonError { message } } } }
  }
}"""


@dataclass(frozen=True)
class RemoteSet:
    """An embedding set in a running deployment."""

    name: str
    location: str
    """The code location that holds its assets."""
    releases: tuple[str, ...]
    shard_keys: tuple[str, ...]
    """The zero-padded partition keys of the dimension ``shard``. The index of a key is the number of its shard."""
    reuses: bool
    """Whether the set has the asset that copies cells of an earlier release. Its partitions have the same keys."""

    def key(self, asset: str) -> dict[str, list[str]]:
        """Return the key of an asset in the form of GraphQL."""
        return {"path": [self.name, asset]}

    def partition(self, release: str, shard: int) -> str:
        """Return the partition key of a shard."""
        return f"{release}|{self.shard_keys[shard]}"

    def check_release(self, release: str) -> None:
        """Refuse a release that is not a partition of the set.

        Raises
        ------
        UserError
            When it is not. The message names the existing releases.
        """
        if release not in self.releases:
            raise UserError(
                f"release {release!r} is not a partition of set {self.name!r}; expected one of: "
                f"{', '.join(self.releases) or 'none was added'}. Add it: census-tf-dagster release add {release}"
            )

    def check_shards(self, shards: Iterable[int]) -> None:
        """Refuse shards that the set does not have.

        Raises
        ------
        UserError
            When there are any. The message names them and the existing range.
        """
        if unknown := [shard for shard in shards if shard >= len(self.shard_keys)]:
            raise UserError(
                f"set {self.name!r} has no shards {compact(unknown)}; expected some of its {len(self.shard_keys)} "
                f"shards, {compact(range(len(self.shard_keys)))}. Correct --shards."
            )


def find_set(deployment: Deployment, name: str) -> RemoteSet:
    """Find a set among the assets of all code locations.

    Raises
    ------
    UserError
        When no code location has its assets; the message names the existing sets, and code locations that do not
        load. Or when its partitions are not those of this package.
    """
    answer = deployment.ask(CATALOG)
    nodes = {tuple(node["assetKey"]["path"]): node for node in answer["assetNodes"]}
    known = sorted({path[0] for path in nodes if all((path[0], asset) in nodes for asset in (PLAN, SHARDS, ARRAY))})
    if name not in known and (name, PLAN) in nodes and (name, ARRAY) in nodes:
        raise UserError(
            f"{name} is a set of files, and this command is for sets of releases "
            f"({', '.join(known) or 'none is there'}). Open {name}/{ARRAY} in the web interface at {deployment.url} to "
            "see and start its files."
        )
    if name not in known:
        raise UserError(
            f"set {name!r} is not in the deployment at {deployment.url}; expected one of: {', '.join(known) or 'none'}."
            " If you have just added it, reload its code location (Deployment, in the web interface), or restart it."
            + "".join(_broken_locations(answer["workspaceOrError"]))
        )
    node = nodes[name, SHARDS]
    dimensions = {one["name"]: tuple(one["partitionKeys"]) for one in node["partitionKeysByDimension"]}
    keys = dimensions.get("shard", ())
    if set(dimensions) != {"release", "shard"} or [int(key) for key in keys if key.isdigit()] != list(range(len(keys))):
        raise UserError(
            f"{name}/{SHARDS} has partitions by {sorted(dimensions) or 'nothing'}; expected release x shard, shards "
            "numbered from 0. The deployment runs another version of this package. Use that version for this command."
        )
    location = str(node["repository"]["location"]["name"])
    return RemoteSet(
        name=name,
        location=location,
        releases=dimensions["release"],
        shard_keys=keys,
        reuses=(name, REUSED) in nodes,
    )


def _broken_locations(workspace: Any) -> Iterable[str]:
    for entry in expect(workspace, "Workspace", "code locations")["locationEntries"]:
        loaded = entry["locationOrLoadError"]
        if loaded is None:
            yield f" Code location {entry['name']} is still loading."
        elif loaded["__typename"] == "PythonError":
            yield f" Code location {entry['name']} does not load: {loaded['message'].strip()}"
