"""Programs that measure what a deployment fetches."""
