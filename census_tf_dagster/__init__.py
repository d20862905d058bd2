"""TranscriptFormer embeddings of every cell of every CELLxGENE Census release, as Dagster assets."""

__version__ = "0.1.0"
