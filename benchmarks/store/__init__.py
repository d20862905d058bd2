"""Programs that measure writing, checking and reading the array."""
