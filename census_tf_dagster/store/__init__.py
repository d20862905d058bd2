"""The store: commits embeddings to arrays, verifies and mends them, and lists and removes releases. No Dagster."""
