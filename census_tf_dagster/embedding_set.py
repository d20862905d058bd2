"""The component behind a set's YAML: one organism, one checkpoint, and the assets that follow from them.

The fields and their limits are declared here. What the assets do belongs to `orchestration`.
"""

from typing import Annotated, Any, Literal, Self

import dagster as dg
from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, field_validator, model_validator

from census_tf_dagster.config.cost import Budget, Spending
from census_tf_dagster.config.field_types import Location
from census_tf_dagster.config.filters import check_filter
from census_tf_dagster.config.placement import Placement, effective, read_placement, shard_tags
from census_tf_dagster.config.publication import Publication
from census_tf_dagster.config.settings import DEFAULT_COMPUTE_PRECISION, SetSettings
from census_tf_dagster.config.templates import validate_resolved
from census_tf_dagster.errors import UserError
from census_tf_dagster.io.names import normalise
from census_tf_dagster.orchestration.assets.approval import build_approval
from census_tf_dagster.orchestration.assets.embeddings_array import build_embeddings_array
from census_tf_dagster.orchestration.assets.obs_id_plan import build_obs_id_plan
from census_tf_dagster.orchestration.assets.reused_embeddings import build_reused_embeddings
from census_tf_dagster.orchestration.assets.shard_embeddings import build_shard_embeddings
from census_tf_dagster.orchestration.automation import automation_sensor
from census_tf_dagster.orchestration.checks.quality import build_quality_checks
from census_tf_dagster.orchestration.checks.rules import build_rule_checks, build_verified_check

NAME = "^[A-Za-z0-9_]{1,100}$"
"""The characters that Dagster allows in the name of a group."""

Owner = Annotated[
    str,
    Field(pattern=r"^(team:[A-Za-z0-9_-]+|[A-Za-z0-9_][A-Za-z0-9._%+-]*@[A-Za-z0-9.-]+\.[A-Za-z]{2,7})$"),
]
"""The owners that Dagster accepts (`dagster._core.utils.is_valid_email`)."""


class EmbeddingSet(dg.Component, dg.Model):
    """An embedding set: one organism, one TranscriptFormer checkpoint, and how cells are embedded with it."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(
        pattern=NAME,
        description="Name of the set (letters, digits and _). It is the prefix of asset keys, the asset group, and the "
        "folder in the store.",
    )
    organism: str = Field(pattern=NAME, description="Key of the organism under census_data, such as homo_sapiens.")
    checkpoint: Location = Field(
        description="Folder or S3 prefix of the checkpoint, as `transcriptformer download` creates it."
    )
    checkpoint_fingerprint: str | None = Field(
        default=None,
        pattern="^[0-9a-f]{64}$",
        description="Required fingerprint of the checkpoint (checkpoint_fingerprint in the identity). A checkpoint "
        "with another fingerprint is refused.",
    )
    pretrained_embeddings: list[Location] = Field(
        default_factory=list,
        max_length=100,
        description="Gene embedding files (.h5) for a species outside the checkpoint's vocabulary.",
    )
    shards: int = Field(
        default=96, ge=1, le=9999, description="Number of shards of a release. Each shard is one Dagster partition."
    )
    value_filter: str | None = Field(
        default=None,
        description="SOMA filter over obs columns: only matching cells are embedded. It consists of comparisons and "
        "`in [...]`, joined by and, or, & and |.",
    )
    mod: int = Field(
        default=1,
        ge=1,
        le=10**9,
        description="Embed only cells whose soma_joinid is divisible by this number, for a trial run on 1 cell in mod.",
    )
    megabatch_size: int = Field(
        default=16384, ge=1, le=131072, description="Number of cells that are read, embedded and committed together."
    )
    batch_size: int | None = Field(
        default=None,
        ge=1,
        le=131072,
        description="Most cells in one row of the model. Default: as many as the free memory holds.",
    )
    compute_precision: Literal["fp32", "fp16", "bf16"] = Field(
        default=DEFAULT_COMPUTE_PRECISION, description="Precision of weights and activations."
    )
    storage_precision: Literal["bfloat16", "float32"] = Field(
        default="bfloat16",
        description="bfloat16: values are rounded to 7 mantissa bits, as in the Census's own embeddings. "
        "float32: values are not rounded.",
    )
    gene_order: Literal["census", "vocabulary"] = Field(
        default="census",
        description="Order in which the model sees a cell's genes. census: the order of var, as upstream uses it. "
        "vocabulary: the order of the checkpoint, which is the same in every release.",
    )
    reuse: bool = Field(
        default=False,
        description="Copy the embeddings of cells that are already in the array of an earlier release of this set "
        "(docs/reuse.md). Adds the asset reused_embeddings.",
    )
    fractional_counts: Literal["embed", "set_aside"] = Field(
        default="embed",
        description="What to do with cells whose counts are not whole numbers. embed: embed them unchanged, as "
        "upstream does. set_aside: leave them without an embedding.",
    )
    device: Literal["cuda", "cpu"] = Field(
        default="cuda", description="Device of the model: cuda, or cpu for small trials."
    )
    auto_start: Literal["off", "on"] | bool | Budget = Field(
        default="off",
        description="Whether new releases start automatically: off, on, or {budget: US dollars per release}. A release "
        "that costs more than the budget waits for a person's approval.",
    )
    owners: list[Owner] = Field(
        default_factory=list,
        max_length=100,
        description="Owners shown in Dagster: e-mail addresses, or teams as `team:name`.",
    )
    publication: Publication | None = Field(
        default=None,
        description="Description of the published array (CxG_embedding_info). You can add it later.",
    )
    placement: Placement | None = Field(
        default=None, description="Entries of the placement that differ from the deployment's placement.yaml."
    )

    @model_validator(mode="wrap")
    @classmethod
    def _resolved(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Replace ``{{ env.NAME }}`` in texts, for every loader: `check`, Dagster, and other Dagster projects."""
        return validate_resolved(value, handler)

    @field_validator("value_filter")
    @classmethod
    def _filter_parses(cls, value: str | None) -> str | None:
        if value is not None:
            check_filter(value)
        return value

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

    def settings(self, deployment: Placement | None = None) -> SetSettings:
        """Return the set as plain values.

        Parameters
        ----------
        deployment
            The deployment's placement. The set's own replaces single entries; prices and fleet come from the result.
        """
        return SetSettings(
            name=self.name,
            organism=self.organism,
            checkpoint=normalise(self.checkpoint),
            pretrained_embeddings=tuple(normalise(uri) for uri in self.pretrained_embeddings),
            shards=self.shards,
            value_filter=self.value_filter,
            mod=self.mod,
            megabatch_size=self.megabatch_size,
            batch_size=self.batch_size,
            compute_precision=self.compute_precision,
            storage_precision=self.storage_precision,
            device=self.device,
            publication=self.publication,
            checkpoint_fingerprint=self.checkpoint_fingerprint,
            spending=self._spending(effective(self.placement, deployment)),
            gene_order=self.gene_order,
            fractional_counts=self.fractional_counts,
            reuse=self.reuse,
            owners=tuple(self.owners),
        )

    def _spending(self, nodes: Placement) -> Spending:
        budget = self.auto_start.budget if isinstance(self.auto_start, Budget) else None
        if budget is not None and nodes.usd_per_gpu_hour is None:
            raise UserError(
                f"set {self.name!r}: auto_start has a budget of {budget:,.2f} USD, and the price of a GPU hour is "
                "unknown; set usd_per_gpu_hour in placement.yaml, or in the set's own `placement`."
            )
        return Spending(
            # YAML reads an unquoted on or off as true or false.
            auto_start=budget is not None or self.auto_start in (True, "on"),
            budget_usd=budget,
            gpu_type=nodes.gpu_type,
            usd_per_gpu_hour=nodes.usd_per_gpu_hour,
            fleet_gpus=nodes.fleet_gpus,
        )

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        """Build the set's assets, the checks of its array, and the sensor that starts it automatically."""
        deployment = read_placement(context.defs_module_path)
        settings = self.settings(deployment)
        placement = shard_tags(self.device, self.placement, deployment)
        return dg.Definitions(
            assets=[
                build_obs_id_plan(settings),
                build_approval(settings),
                build_shard_embeddings(settings, placement),
                *([build_reused_embeddings(settings)] if settings.reuse else []),
                build_embeddings_array(settings),
            ],
            sensors=[sensor] if (sensor := automation_sensor(self.name, settings.spending)) else [],
            asset_checks=[build_verified_check(settings), build_rule_checks(settings), build_quality_checks(settings)],
        )
