"""Files, S3, names and processes, which all other packages use. Nothing here knows about embeddings."""
