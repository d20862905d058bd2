"""From counts to embeddings: tokens, checkpoint, model, engine. Imports no Dagster."""
