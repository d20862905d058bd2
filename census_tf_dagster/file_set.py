"""The component behind the YAML of a set of files: a folder of files with own cells, one checkpoint, and the assets.

The fields are declared in `config.settings`. What the assets do belongs to `orchestration`.
"""

import dagster as dg

from census_tf_dagster.config.placement import read_placement, shard_tags
from census_tf_dagster.config.settings import FileSetSettings
from census_tf_dagster.embedding_set import SetComponent
from census_tf_dagster.orchestration.assets.approval import build_approval
from census_tf_dagster.orchestration.assets.file_embeddings import build_file_embeddings
from census_tf_dagster.orchestration.assets.file_plan import build_file_plan
from census_tf_dagster.orchestration.automation import automation_sensor
from census_tf_dagster.orchestration.sensors.new_files import build_new_files


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
