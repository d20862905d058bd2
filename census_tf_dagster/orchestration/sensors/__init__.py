"""The sensors: `release_watch` adds new releases, and `lost_runs` ends or repeats what was lost or left behind."""
