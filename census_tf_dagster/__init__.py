"""TranscriptFormer embeddings of every cell of every CELLxGENE Census release, as Dagster assets.

Each embedding set (organism x checkpoint) has the assets `obs_id_plan`, `approval`, `shard_embeddings` and
`embeddings_array`. A set with `reuse` also has `reused_embeddings`.
"""

__version__ = "0.1.0"
