"""Programs that measure whole steps of a release."""
