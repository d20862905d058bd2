"""Files, S3 and names: what every room uses, and nothing of embeddings."""
