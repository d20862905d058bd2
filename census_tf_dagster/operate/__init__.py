"""The commands for a running deployment: launch a release, approve it, show its status, and the dry run of a launch.

They talk to the deployment's webserver over HTTP (GraphQL) and import no Dagster. Only the dry run opens the Census,
the checkpoint and the store; all other access to data belongs to `pipeline` and `store`.
"""
