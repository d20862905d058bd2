"""A set's settings as plain values. Imports nothing, so that definitions load light."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SetSettings:
    """What a set embeds, and how. Plain values of the set's YAML."""

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
