"""Programs that measure Dagster with this project's definitions."""
