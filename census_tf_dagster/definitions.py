"""What Dagster loads: the sets of this deployment, its Census and its store.

This module reads the variables of a deployment; the command line adds only DAGSTER_HOME and the webserver's address.
Without any variable you get the demo:

=============================  ==========================================  =============================
variable                       meaning                                     default
=============================  ==========================================  =============================
CENSUS_TF_SETS                 folder or S3 prefix of <set>/defs.yaml      the demo sets of this package
CENSUS_TF_CENSUS               ``public``, or a location with {release}    demo-data/census/{release}
CENSUS_TF_CENSUS_DIRECTORY     address of the list of public releases      as in cellxgene_census
CENSUS_TF_RELEASES             ``lts``, or ``weekly``: both kinds          lts
CENSUS_TF_CENSUS_S3_REGION     region of the Census's bucket               us-west-2
CENSUS_TF_CENSUS_S3_ENDPOINT   S3-compatible server of the Census          AWS
CENSUS_TF_CENSUS_S3_SIGNED     1: use this machine's credentials           anonymous
CENSUS_TF_STORE                folder or S3 prefix of plans and arrays     demo-data/store
CENSUS_TF_STORE_S3_REGION      region of the store's bucket                as in AWS's own settings
CENSUS_TF_STORE_S3_ENDPOINT    S3-compatible server of the store           AWS
CENSUS_TF_CACHE                local folder for fetched checkpoints        ~/.cache/census-tf-dagster
CENSUS_TF_ALERTS               ARN of an SNS topic, or a variable's name   no alerts
CENSUS_TF_ALERT_IDLE           alert if GPUs wait more of their time       0.5
=============================  ==========================================  =============================

Credentials come from the environment or the role, as for every AWS tool. None of these variables holds any.
"""

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import dagster as dg

from census_tf_dagster.config import variables
from census_tf_dagster.config.dagster_names import ARRAY, PLAN, SHARDS
from census_tf_dagster.config.placement import read_placement
from census_tf_dagster.config.retention import Retention, read_retention
from census_tf_dagster.config.settings import CommonSettings, FileSetSettings, SetSettings
from census_tf_dagster.errors import UserError
from census_tf_dagster.io.names import is_local
from census_tf_dagster.orchestration.asset_support import file_context, release_context
from census_tf_dagster.orchestration.partitions import RELEASES
from census_tf_dagster.orchestration.resources import CensusResource, StoreResource
from census_tf_dagster.orchestration.retention_job import build_retention
from census_tf_dagster.orchestration.sensors.alerts import IDLE, build_alerts
from census_tf_dagster.orchestration.sensors.lost_runs import build_lost_runs, marking_executor
from census_tf_dagster.orchestration.sensors.release_watch import Kinds, build_release_watch, read_kinds
from census_tf_dagster.set_files import TYPES, require_right_files

if TYPE_CHECKING:
    from census_tf_dagster.own_cells.file_context import FileContext
    from census_tf_dagster.pipeline.context import ReleaseContext


def load_sets(folder: Path) -> dg.Definitions:
    """Build the assets of every ``<set>/defs.yaml`` below `folder`.

    Raises
    ------
    UserError
        When there is no set, or a file has mistakes. The message lists all of them.
    """
    with _component_tree(folder) as tree:
        return tree.build_defs()


def load_settings(folder: Path) -> dict[str, CommonSettings]:
    """Load the settings of every set below `folder`, by name."""
    deployment = read_placement(folder)
    with _component_tree(folder) as tree:
        found = [one for kind in TYPES.values() for one in tree.get_all_components(of_type=kind)]
        return {one.name: one.placed(deployment) for one in found}


@contextmanager
def _component_tree(folder: Path) -> Iterator[dg.ComponentTree]:
    require_right_files(folder)
    # The folder may be mounted anywhere, but Dagster's component loader expects a package.
    package = ModuleType("census_tf_sets")
    package.__file__ = None
    package.__path__ = [str(folder.absolute())]
    sys.modules[package.__name__] = package
    with warnings.catch_warnings():
        # Dagster attaches code references, which it still marks as beta, to everything it loads.
        warnings.simplefilter("ignore", dg.BetaWarning)
        warnings.simplefilter("ignore", dg.PreviewWarning)
        yield dg.ComponentTree.from_module(package, project_root=folder.absolute())


def build_definitions(
    sets: dg.Definitions,
    census: CensusResource,
    store: StoreResource,
    kinds: Kinds = "lts",
    retention: Retention | None = None,
    alerts: str = "",
    alert_idle: float = IDLE,
) -> dg.Definitions:
    """Assemble the definitions of a deployment.

    Parameters
    ----------
    sets
        The assets and checks of all sets.
    census, store
        The resources of the deployment.
    kinds
        Which releases are added automatically.
    retention
        The policy for old plans and arrays; None: they are kept.
    alerts, alert_idle
        Where alerts go (empty: nowhere), and the share of waiting GPU time that is told, as in `build_alerts`.
    """
    assets = [asset for asset in sets.assets or () if isinstance(asset, dg.AssetsDefinition)]
    planned = {key: asset.partitions_def for asset in assets for key in asset.keys if key.path[-1] == PLAN}
    plans = [key for key, partitions in planned.items() if partitions == RELEASES]
    told = {key.path[0]: (SHARDS,) if key in plans else (PLAN, ARRAY) for key in planned}
    return dg.Definitions.merge(
        sets,
        build_release_watch(kinds, plans),
        build_retention(retention or Retention()),
        build_lost_runs(),
        build_alerts(alerts, alert_idle, told),
        dg.Definitions(
            resources={"census": census, "store": store},
            executor=marking_executor,
        ),
    )


def sets_folder(environment: Mapping[str, str] = os.environ) -> Path:
    """Return the folder of this deployment's sets. Sets on S3 are fetched to a local folder first."""
    sets = variables.location(environment, "CENSUS_TF_SETS", str(Path(__file__).parent / "defs"))
    if is_local(sets):
        return Path(sets.removeprefix("file://")).expanduser()
    from census_tf_dagster.config.remote_sets import fetch_sets
    from census_tf_dagster.io.s3 import S3Settings

    store = store_resource(environment)
    return fetch_sets(sets, S3Settings(store.s3_region, store.s3_endpoint))


def census_resource(environment: Mapping[str, str] = os.environ) -> CensusResource:
    """Return the Census of this deployment."""
    return CensusResource(
        location=variables.census_location(environment, "CENSUS_TF_CENSUS", "demo-data/census/{release}"),
        directory=variables.web_address(environment, "CENSUS_TF_CENSUS_DIRECTORY"),
        s3_region=variables.region(environment, "CENSUS_TF_CENSUS_S3_REGION", "us-west-2"),
        s3_endpoint=variables.endpoint(environment, "CENSUS_TF_CENSUS_S3_ENDPOINT"),
        s3_anonymous=not variables.switch(environment, "CENSUS_TF_CENSUS_S3_SIGNED"),
    )


def store_resource(environment: Mapping[str, str] = os.environ) -> StoreResource:
    """Return the store of this deployment."""
    return StoreResource(
        location=variables.location(environment, "CENSUS_TF_STORE", "demo-data/store"),
        s3_region=variables.region(environment, "CENSUS_TF_STORE_S3_REGION", ""),
        s3_endpoint=variables.endpoint(environment, "CENSUS_TF_STORE_S3_ENDPOINT"),
        cache=variables.folder(environment, "CENSUS_TF_CACHE", "~/.cache/census-tf-dagster"),
    )


@contextmanager
def deployed_context(set_name: str, partition: str) -> Iterator["FileContext | ReleaseContext"]:
    """Open the context of a release or file of one of this deployment's sets.

    Raises
    ------
    UserError
        When there is no such set, or as in `open_context` or `open_file`.
    """
    settings, census, store = _deployed(set_name), census_resource(), store_resource()
    if isinstance(settings, SetSettings):
        with release_context(settings, partition, census, store) as release:
            yield release
    elif isinstance(settings, FileSetSettings):
        with file_context(settings, partition, store) as file:
            yield file


@contextmanager
def deployed_release(set_name: str, release: str) -> Iterator["ReleaseContext"]:
    """Open the context of a release of one of this deployment's sets.

    Raises
    ------
    UserError
        When there is no such set, it is a set of files, or as in `open_context`.
    """
    settings = _deployed(set_name)
    if not isinstance(settings, SetSettings):
        raise UserError(
            f"{set_name} is a set of files; expected a set of releases. To see what a file costs, materialize "
            f"{set_name}/{PLAN} of it: that computes no embedding."
        )
    with release_context(settings, release, census_resource(), store_resource()) as opened:
        yield opened


def _deployed(set_name: str) -> CommonSettings:
    sets = load_settings(sets_folder())
    if set_name not in sets:
        raise UserError(
            f"there is no set {set_name!r}; expected one of this deployment: {', '.join(sorted(sets))}. Correct the "
            "name, or set CENSUS_TF_SETS to the folder that has it."
        )
    return sets[set_name]


# In the process of a run, Dagster calls this six times. It reloads a code location in a new process.
@dg.definitions
@cache
def defs() -> dg.Definitions:
    """Return the definitions that Dagster's tools load."""
    kinds = read_kinds(os.environ.get("CENSUS_TF_RELEASES", "lts"))
    folder = sets_folder()
    return build_definitions(
        load_sets(folder),
        census_resource(),
        store_resource(),
        kinds,
        read_retention(folder),
        variables.alert_channel(os.environ, "CENSUS_TF_ALERTS"),
        variables.share(os.environ, "CENSUS_TF_ALERT_IDLE", IDLE),
    )
