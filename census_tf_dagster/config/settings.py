"""The settings of a set of releases or of files: the fields of its YAML, their limits, and what the pipeline receives.

This module imports nothing heavy, so that Dagster's definitions load quickly.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    field_validator,
    model_validator,
)

from census_tf_dagster.config.cost import Budget, Spending
from census_tf_dagster.config.field_types import Location, Name
from census_tf_dagster.config.filters import check_filter
from census_tf_dagster.config.placement import Placement, effective
from census_tf_dagster.config.publication import Publication
from census_tf_dagster.config.templates import validate_resolved
from census_tf_dagster.errors import UserError
from census_tf_dagster.io.names import normalise

NAME = "^[A-Za-z0-9_]{1,100}$"
"""The characters that Dagster allows in the name of a group."""

Owner = Annotated[
    str,
    Field(pattern=r"^(team:[A-Za-z0-9_-]+|[A-Za-z0-9_][A-Za-z0-9._%+-]*@[A-Za-z0-9.-]+\.[A-Za-z]{2,7})$"),
]
"""The owners that Dagster accepts (`dagster._core.utils.is_valid_email`)."""

NormalLocation = Annotated[Location, AfterValidator(normalise)]

DEFAULT_COMPUTE_PRECISION: Literal["fp16"] = "fp16"
"""The fastest precision whose relative RMS error against fp32 stays below 1e-3. Measured on a random model: fp16 7e-4,
bf16 1.7e-3 (autocast) to 7e-3. The risk of fp16 is its range, so cells that exceed it are computed again in fp32."""


class CommonSettings(BaseModel):
    """What all sets have: the model, how it computes, and who decides about its costs."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(
        pattern=NAME,
        description="Name of the set (letters, digits and _). It is the prefix of asset keys, the asset group, and the "
        "folder in the store.",
    )
    checkpoint: NormalLocation = Field(
        description="Folder or S3 prefix of the checkpoint, as `transcriptformer download` creates it."
    )
    checkpoint_fingerprint: str | None = Field(
        default=None,
        pattern="^[0-9a-f]{64}$",
        description="Required fingerprint of the checkpoint (checkpoint_fingerprint in the identity). A checkpoint "
        "with another fingerprint is refused.",
    )
    pretrained_embeddings: list[NormalLocation] = Field(
        default_factory=list,
        max_length=100,
        description="Gene embedding files (.h5) for a species outside the checkpoint's vocabulary.",
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
        description="Whether new releases (or files) start automatically: off, on, or {budget: US dollars per release "
        "or file}. What costs more than the budget waits for a person's approval.",
    )
    owners: list[Owner] = Field(
        default_factory=list,
        max_length=100,
        description="Owners shown in Dagster: e-mail addresses, or teams as `team:name`.",
    )
    placement: Placement | None = Field(
        default=None, description="Entries of the placement that differ from the deployment's placement.yaml."
    )

    _spending: Spending = PrivateAttr(default_factory=Spending)

    @model_validator(mode="wrap")
    @classmethod
    def _resolved(cls, value: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Replace ``{{ env.NAME }}`` in texts, for every loader: `check`, Dagster, and other Dagster projects."""
        return validate_resolved(value, handler)

    def placed(self, deployment: Placement | None = None) -> Self:
        """Return the set in a deployment with this placement.

        Parameters
        ----------
        deployment
            The deployment's placement. The set's own replaces single entries; prices and fleet come from the result.

        Raises
        ------
        UserError
            When the set has a budget and the price of a GPU hour is unknown.
        """
        nodes = effective(self.placement, deployment)
        budget = self.auto_start.budget if isinstance(self.auto_start, Budget) else None
        if budget is not None and nodes.usd_per_gpu_hour is None:
            raise UserError(
                f"set {self.name!r}: auto_start has a budget of {budget:,.2f} USD, and the price of a GPU hour is "
                "unknown; set usd_per_gpu_hour in placement.yaml, or in the set's own `placement`."
            )
        placed = self.model_copy()
        placed._spending = Spending(
            # YAML reads an unquoted on or off as true or false.
            auto_start=budget is not None or self.auto_start in (True, "on"),
            budget_usd=budget,
            gpu_type=nodes.gpu_type,
            usd_per_gpu_hour=nodes.usd_per_gpu_hour,
            fleet_gpus=nodes.fleet_gpus,
        )
        return placed

    @property
    def spending(self) -> Spending:
        """When the set starts by itself, and the prices of its work. Only a set that is `placed` knows them."""
        return self._spending

    @property
    def may_lack_upstream(self) -> bool:
        """Whether a shard is fine without upstream on its machine: a set on the CPU is a small trial."""
        return self.device == "cpu"


class SetSettings(CommonSettings):
    """What a set of releases embeds, and how. `placed` adds what the deployment decides."""

    organism: str = Field(pattern=NAME, description="Key of the organism under census_data, such as homo_sapiens.")
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
    search_index: bool = Field(
        default=False,
        description="Build an index of each release's array, to search it for nearest cells (docs/search.md). Adds the "
        "asset embeddings_index.",
    )
    publication: Publication | None = Field(
        default=None,
        description="Description of the published array (CxG_embedding_info). You can add it later.",
    )

    @field_validator("value_filter")
    @classmethod
    def _filter_parses(cls, value: str | None) -> str | None:
        if value is not None:
            check_filter(value)
        return value


class FileSetSettings(CommonSettings):
    """Which files a set of files embeds, and how. `placed` adds what the deployment decides."""

    files: NormalLocation = Field(
        description="Folder or S3 prefix of the files. Each h5ad file, zarr folder and SOMA experiment directly below "
        "it becomes a partition."
    )
    layer: Name | None = Field(
        default=None, description="The matrix with raw counts: X, raw, or a layer. Default: raw if it is there."
    )
    gene_column: Name | None = Field(
        default=None,
        description="Column of var with Ensembl ids, or `index`. Default: the one of which the checkpoint knows most.",
    )
    duplicate_genes: Literal["refuse", "first"] = Field(
        default="refuse",
        description="Refuse a file in which a gene occurs twice, or use the first column of each gene.",
    )
    assay_column: Name | None = Field(
        default=None, description="Column of obs with the assay. Default: the checkpoint's, if obs has it."
    )
    assay: Name | None = Field(default=None, description="One assay for all cells.")
    gene_order: Literal["file", "vocabulary"] | None = Field(
        default=None,
        description="Order in which the model sees a cell's genes: that of var, or that of the checkpoint. Default: "
        "that of `like`, otherwise file.",
    )
    like: NormalLocation | None = Field(
        default=None,
        description="Address of the array of a release beside which the embeddings will stand. Checkpoint, precisions "
        "and fractional_counts must be those of the array.",
    )

    @model_validator(mode="after")
    def _one_source_of_assays(self) -> Self:
        if self.assay is not None and self.assay_column is not None:
            raise ValueError("Only one of assay and assay_column may be given")
        return self

    @model_validator(mode="after")
    def _order_of_the_array(self) -> Self:
        # The array of a release never has the order of a file.
        if self.like is not None and self.gene_order == "file":
            raise ValueError("Leave out gene_order: file, because like takes the order from its array")
        return self
