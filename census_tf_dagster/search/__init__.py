"""Searches the index of an array for the cells that are nearest to given embeddings. Building it: `pipeline`."""
