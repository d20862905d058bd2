"""The sets that this deployment builds, one folder with a defs.yaml each."""
