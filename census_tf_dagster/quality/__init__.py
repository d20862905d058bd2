"""Measures the quality of finished embeddings: figures and pictures of a sample, and the covered cells of a release."""
