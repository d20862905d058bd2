"""Turns counts into embeddings: tokens, checkpoint, model, engine. Imports no Dagster."""
