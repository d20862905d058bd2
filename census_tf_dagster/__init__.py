"""TranscriptFormer embeddings of every cell of every CELLxGENE Census release, as Dagster assets.

Each embedding set (organism x checkpoint) has the assets `obs_id_plan`, `approval`, `shard_embeddings` and
`embeddings_array`. A set with `reuse` also has `reused_embeddings`. `embed` embeds cells that are not in a Census.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from census_tf_dagster.own_cells.embed import embed

__all__ = ["embed"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Dagster imports this package in every process, and most of them embed nothing.
    if name == "embed":
        from census_tf_dagster.own_cells.embed import embed

        return embed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
