"""Writes a small Census and a small checkpoint in the real formats, for trials and tests without downloads."""
