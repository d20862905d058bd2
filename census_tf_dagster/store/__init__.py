"""The store: where plans and arrays stand, how embeddings are committed, what is verified about them."""
