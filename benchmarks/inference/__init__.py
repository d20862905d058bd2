"""Programs that measure the model and the way from counts to its input."""
