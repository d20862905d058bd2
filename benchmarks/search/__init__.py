"""Benchmarks of the index of an array."""
