"""The sets of a running deployment: where their assets are, their releases and their shards."""

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
    """A set as a running deployment has it."""

    name: str
    location: str
    """The code location that holds its assets."""
    releases: tuple[str, ...]
    shard_keys: tuple[str, ...]
    """Partition keys of the shards in the dimension ``shard``: zero-padded, at the index that is their number."""
    reuses: bool
    """Whether it has an asset that copies cells of an earlier release; its partitions have the same keys."""

    def key(self, asset: str) -> dict[str, list[str]]:
        """Return an asset's key as GraphQL takes it."""
        return {"path": [self.name, asset]}

    def partition(self, release: str, shard: int) -> str:
        """Return the partition key of a shard."""
        return f"{release}|{self.shard_keys[shard]}"

    def check_release(self, release: str) -> None:
        """Refuse a release that is no partition.

        Raises
        ------
        UserError
            Naming the releases that there are.
        """
        if release not in self.releases:
            raise UserError(
                f"release {release!r} is no partition of set {self.name!r}; there are: "
                f"{', '.join(self.releases) or 'none'}. Add it: python -m census_tf_dagster release add {release}"
            )

    def check_shards(self, shards: Iterable[int]) -> None:
        """Refuse shards that the set does not have.

        Raises
        ------
        UserError
            Naming them, and the range that exists.
        """
        if unknown := [shard for shard in shards if shard >= len(self.shard_keys)]:
            raise UserError(
                f"set {self.name!r} has no shards {compact(unknown)}: it has {len(self.shard_keys)}, which are "
                f"{compact(range(len(self.shard_keys)))}."
            )


def find_set(deployment: Deployment, name: str) -> RemoteSet:
    """Find a set among the assets of all code locations.

    Raises
    ------
    UserError
        When no code location has its assets, with the sets that there are and the code locations that do not
        load; or when its partitions are not those of this package.
    """
    answer = deployment.ask(CATALOG)
    nodes = {tuple(node["assetKey"]["path"]): node for node in answer["assetNodes"]}
    known = sorted({path[0] for path in nodes if all((path[0], asset) in nodes for asset in (PLAN, SHARDS, ARRAY))})
    if name not in known:
        raise UserError(
            f"set {name!r} is not in the deployment at {deployment.url}; there are: {', '.join(known) or 'none'}. "
            "One that was added since: reload its code location (Deployment, in the web interface), or restart it."
            + "".join(_broken_locations(answer["workspaceOrError"]))
        )
    node = nodes[name, SHARDS]
    dimensions = {one["name"]: tuple(one["partitionKeys"]) for one in node["partitionKeysByDimension"]}
    keys = dimensions.get("shard", ())
    if set(dimensions) != {"release", "shard"} or [int(key) for key in keys if key.isdigit()] != list(range(len(keys))):
        raise UserError(
            f"{name}/{SHARDS} has partitions by {sorted(dimensions) or 'nothing'}; expected release x shard, shards "
            "numbered from 0: the deployment runs another version of this package."
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
