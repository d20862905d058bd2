"""The store: where plans and arrays stand, how embeddings are committed, what is proved about them."""
