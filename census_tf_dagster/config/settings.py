"""A set's settings as plain values: what `EmbeddingSet` makes of the YAML, and what the pipeline receives.

This module imports nothing heavy, so that Dagster's definitions load quickly.
"""

from dataclasses import dataclass, field
from typing import Literal

from census_tf_dagster.config.cost import Spending
from census_tf_dagster.config.publication import Publication

DEFAULT_COMPUTE_PRECISION: Literal["fp16"] = "fp16"
"""The fastest precision whose relative RMS error against fp32 stays below 1e-3. Measured on a random model: fp16 7e-4,
bf16 1.7e-3 (autocast) to 7e-3. The risk of fp16 is its range, so cells that exceed it are computed again in fp32."""


@dataclass(frozen=True)
class SetSettings:
    """What a set embeds, and how. `EmbeddingSet` describes each field."""

    name: str
    organism: str
    checkpoint: str
    pretrained_embeddings: tuple[str, ...]
    shards: int
    value_filter: str | None
    mod: int
    megabatch_size: int
    batch_size: int | None
    compute_precision: str
    storage_precision: str
    device: str
    publication: Publication | None
    checkpoint_fingerprint: str | None = None
    spending: Spending = field(default_factory=Spending)
    gene_order: Literal["census", "vocabulary"] = "census"
    reuse: bool = False
    fractional_counts: Literal["embed", "set_aside"] = "embed"
    owners: tuple[str, ...] = ()

    @property
    def may_lack_upstream(self) -> bool:
        """Whether a shard is fine without upstream on its machine: a set on the CPU is a small trial."""
        return self.device == "cpu"
