"""What finished embeddings are worth: a sample measured and pictured, and which cells of a release they cover."""
