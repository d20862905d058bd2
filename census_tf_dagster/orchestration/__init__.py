"""Everything that imports Dagster: assets, checks, sensors, jobs, partitions and resources. Holds no algorithm."""
