"""The Census side: finds releases, plans which cells are embedded where, and reads their counts. Imports no Dagster."""
