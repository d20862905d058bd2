"""The sensors: `release_watch` adds new releases, and `lost_runs` ends or retries runs that were lost."""
