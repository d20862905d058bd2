"""An operator's commands on a running deployment, over its webserver's GraphQL: launch a release, show its state."""
