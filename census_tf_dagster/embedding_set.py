"""The components behind the YAML of a set of releases and of a set of files, and the assets that follow from them.

The fields are declared in `config.settings`. What the assets do belongs to `orchestration`.
"""

from typing import Self

import dagster as dg
from pydantic import BaseModel

from census_tf_dagster.config.placement import read_placement, shard_tags
from census_tf_dagster.config.settings import CommonSettings, FileSetSettings, SetSettings
from census_tf_dagster.orchestration.assets.approval import build_approval
from census_tf_dagster.orchestration.assets.embeddings_array import build_embeddings_array
from census_tf_dagster.orchestration.assets.embeddings_index import build_embeddings_index
from census_tf_dagster.orchestration.assets.file_embeddings import build_file_embeddings
from census_tf_dagster.orchestration.assets.file_plan import build_file_plan
from census_tf_dagster.orchestration.assets.obs_id_plan import build_obs_id_plan
from census_tf_dagster.orchestration.assets.reused_embeddings import build_reused_embeddings
from census_tf_dagster.orchestration.assets.shard_embeddings import build_shard_embeddings
from census_tf_dagster.orchestration.automation import automation_sensor
from census_tf_dagster.orchestration.checks.index import build_index_checks
from census_tf_dagster.orchestration.checks.quality import build_quality_checks
from census_tf_dagster.orchestration.checks.rules import build_rule_checks, build_verified_check
from census_tf_dagster.orchestration.sensors.new_files import build_new_files


class SetComponent(dg.Component, CommonSettings):
    """A component whose attributes are its own fields."""

    @classmethod
    def get_model_cls(cls) -> type[BaseModel]:
        """Return this class as the schema, so that `dg check yaml` is as strict as loading."""
        return cls

    @classmethod
    def load(cls, attributes: BaseModel | None, context: dg.ComponentLoadContext) -> Self:  # noqa: ARG003
        """Return the validated attributes. Dagster's templates are not evaluated, because they can run code."""
        if not isinstance(attributes, cls):
            raise TypeError(f"attributes are {type(attributes).__name__}; expected {cls.__name__}")
        return attributes


class EmbeddingSet(SetComponent, SetSettings):
    """An embedding set: one organism, one TranscriptFormer checkpoint, and how cells are embedded with it."""

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        """Build the set's assets, the checks of its array, and the sensor that starts it automatically."""
        deployment = read_placement(context.defs_module_path)
        settings = self.placed(deployment)
        placement = shard_tags(self.device, self.placement, deployment)
        return dg.Definitions(
            assets=[
                build_obs_id_plan(settings),
                build_approval(settings),
                build_shard_embeddings(settings, placement),
                *([build_reused_embeddings(settings)] if settings.reuse else []),
                build_embeddings_array(settings),
                *([build_embeddings_index(settings)] if settings.search_index else []),
            ],
            sensors=[sensor] if (sensor := automation_sensor(self.name, settings.spending)) else [],
            asset_checks=[
                build_verified_check(settings),
                build_rule_checks(settings),
                build_quality_checks(settings),
                *([build_index_checks(settings)] if settings.search_index else []),
            ],
        )


class FileSet(SetComponent, FileSetSettings):
    """A set of files: cells that are not in a Census, one TranscriptFormer checkpoint, and how cells are embedded."""

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        """Build the set's assets, their checks, and the sensors that find files and start them."""
        deployment = read_placement(context.defs_module_path)
        settings = self.placed(deployment)
        placement = shard_tags(self.device, self.placement, deployment)
        started = automation_sensor(self.name, settings.spending)
        return dg.Definitions(
            assets=[build_file_plan(settings), build_approval(settings), build_file_embeddings(settings, placement)],
            sensors=[build_new_files(settings), *([started] if started else [])],
        )
