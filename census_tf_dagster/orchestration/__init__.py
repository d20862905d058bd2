"""Assets, checks, sensors, jobs, partitions and resources: whatever imports Dagster. Algorithms do not belong here."""
